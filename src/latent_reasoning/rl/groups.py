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
from latent_reasoning.rl.reward import Verdict, Verdicts, judge, label_number, rewards
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
    samples = _samples(rollouts, verdicts)
    prompts, groups, group_size = samples.length.shape
    # A question that occurs twice pools the samples of its first groups, of its second ones, ..
    rows = [question for question in questions for _ in range(group_size)]
    by_row = Verdicts(*(values.transpose(1, 2).flatten(0, 1) for values in samples.fields))
    values = rewards(rows, by_row, settings).view(prompts, group_size, groups).transpose(1, 2)
    per_sample = advantages(values.flatten(), group_size).view(prompts, -1)
    parts = per_sample.split([len(rollout.prompts) for rollout in rollouts])
    return (
        [_of_completions(r, part) for r, part in zip(rollouts, parts, strict=True)],
        _means(values, samples) | _completion_means(rollouts),
    )


def _samples(rollouts: Sequence[Rollout], verdicts: Sequence[Sequence[Verdict]]) -> Verdicts:
    """The verdict on each sample of all prompts: (P, groups, G)."""
    parts = [
        Verdicts.of(verdicts_of)[rollout.sample_completion.unflatten(1, (rollout.groups, -1))]
        for rollout, verdicts_of in zip(rollouts, verdicts, strict=True)
    ]
    return Verdicts(*(torch.cat(fields) for fields in zip(*(p.fields for p in parts), strict=True)))


def _of_completions(rollout: Rollout, per_sample: Tensor) -> Tensor:
    """(P, groups x G) -> (U,): means over a completion's samples, equal ones within a group."""
    index, per_sample = rollout.sample_completion.flatten(), per_sample.flatten()
    zeros = per_sample.new_zeros(len(rollout.completions))
    least = zeros.scatter_reduce(0, index, per_sample, "amin", include_self=False)
    # Added to the least, so that the mean of equal numbers is that number to the bit.
    return least.index_add(0, index, (per_sample - least[index]) / rollout.weights[index])


def _means(rewards: Tensor, samples: Verdicts) -> dict[str, float]:
    """What is logged of a step's samples, (P, groups, G)."""
    count = rewards.numel()
    return {
        "reward": rewards.flatten().mean().item(),
        "reasoning_tokens": samples.length.sum().item() / count,
        "rollout_accuracy": samples.correct.flatten().float().mean().item(),
        "badly_formatted_share": (~samples.well_formatted).sum().item() / count,
        "all_correct_share": samples.correct.all(-1).flatten().float().mean().item(),
    }


def _completion_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Distinct completions, which had to be scored, for each sample of a group."""
    samples = sum(rollout.sample_completion.numel() / rollout.groups for rollout in rollouts)
    return {"distinct_share": sum(len(rollout.completions) for rollout in rollouts) / samples}
