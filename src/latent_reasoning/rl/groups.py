"""From rollouts to advantages: each distinct completion is judged once, each sample rewarded.

All prompts of an optimiser step are rewarded together, because a question that occurs twice in it
pools its samples (`reward.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Reward
from latent_reasoning.data.answers import START
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import decode, encode_prompts
from latent_reasoning.rl.grpo import advantages
from latent_reasoning.rl.reward import Verdict, judge, label_number, rewards
from latent_reasoning.rl.rollouts import Rollout


@dataclass(frozen=True)
class Prompt:
    """A question to sample answers to: its ids, the same as text, and the right answer."""

    ids: list[int]
    text: str
    label: str


def rl_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    max_prompt_tokens: int | None,
) -> list[Prompt]:
    """The rows as prompts that end in START, those of more tokens than the limit left out.

    Raises `DataError` for an answer without a number, or where no prompt is left.
    """
    for row in rows:
        label_number(row.answer, f"row {row.id}")
    encoded = encode_prompts(rows, tokenizer, prefix=prefix, latent=True)
    prompts = [
        Prompt(ids, prefix + row.question + START, row.answer)
        for row, ids in zip(rows, encoded, strict=True)
        if max_prompt_tokens is None or len(ids) <= max_prompt_tokens
    ]
    if not prompts:
        raise DataError(
            f"all {len(rows)} prompts are longer than max_prompt_tokens: {max_prompt_tokens} allows"
        )
    return prompts


def judge_completions(
    rollout: Rollout, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[Verdict]:
    """The verdict on each distinct completion; `prompts` are those of the rollout, in its order."""
    eos_id = tokenizer.eos_token_id
    texts = [
        decode(tokenizer, [token for token in completion.ids if token != eos_id])
        for completion in rollout.completions
    ]
    return [
        judge(prompts[completion.prompt].text, text, prompts[completion.prompt].label)
        for completion, text in zip(rollout.completions, texts, strict=True)
    ]


def reward_groups(
    rollouts: Sequence[Rollout],
    verdicts: Sequence[Sequence[Verdict]],
    questions: Sequence[str],
    settings: Reward,
) -> tuple[list[Tensor], dict[str, float]]:
    """Advantages of each rollout's completions, (U,) each, and the step's means.

    `verdicts` are those of `judge_completions`; `questions` says which question each prompt is, one
    rollout's prompts after the other's.
    """
    group_size = rollouts[0].sample_completion.shape[1]
    samples = [
        verdicts_of[index]
        for rollout, verdicts_of in zip(rollouts, verdicts, strict=True)
        for index in rollout.sample_completion.flatten().tolist()
    ]
    groups = [question for question in questions for _ in range(group_size)]
    values = torch.tensor(rewards(groups, samples, settings), dtype=torch.float64)
    sizes = [rollout.sample_completion.numel() for rollout in rollouts]
    per_sample = advantages(values, group_size).split(sizes)
    return (
        [_of_completions(r, part) for r, part in zip(rollouts, per_sample, strict=True)],
        _means(values, samples, group_size) | _completion_means(rollouts),
    )


def _of_completions(rollout: Rollout, per_sample: Tensor) -> Tensor:
    """(P x G,) -> (U,): equal samples of a group have equal advantages."""
    values = per_sample.new_zeros(len(rollout.completions))
    values[rollout.sample_completion.flatten()] = per_sample
    return values


def _means(values: Tensor, samples: Sequence[Verdict], group_size: int) -> dict[str, float]:
    """What is logged of a step's samples."""
    correct = torch.tensor([verdict.correct for verdict in samples])
    count = len(samples)
    return {
        "reward": values.mean().item(),
        "reasoning_tokens": sum(verdict.length for verdict in samples) / count,
        "rollout_accuracy": correct.float().mean().item(),
        "badly_formatted_share": sum(not verdict.well_formatted for verdict in samples) / count,
        "all_correct_share": correct.view(-1, group_size).all(1).float().mean().item(),
    }


def _completion_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of a step's samples, the share that is distinct: what had to be scored."""
    samples = sum(rollout.sample_completion.numel() for rollout in rollouts)
    return {"distinct_share": sum(len(rollout.completions) for rollout in rollouts) / samples}
