"""Greedy validation during training: accuracy and length on rows of the validation split."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.answers import CONTINUE, START, STOP, judge, split_completion
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import decode, encode_prompts
from latent_reasoning.model.generation import generate
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.parallel import ALONE, OneProcess


def greedy_validation(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    prompt_prefix: str,
    max_new_tokens: int,
    batch_size: int,
    forced_steps: int | None = None,
    beginnings: Sequence[list[int]] | None = None,
    processes: OneProcess = ALONE,
) -> dict[str, float]:
    """Decode every row greedily; `prompt_prefix` stands before the question in the prompt.

    A latent model thinks, `forced_steps` steps where given. `beginnings` are ids after each prompt
    that the completion has to start with; they count in no length. Returns `validation_accuracy`,
    `validation_reasoning_tokens` (mean), `validation_badly_formatted` (share) and
    `validation_rows`. Each of `processes` decodes its share of the rows.
    """
    latent = model.settings is not None
    prompts = encode_prompts(
        rows, tokenizer, prefix=prompt_prefix, latent=latent, forced_steps=forced_steps
    )
    if beginnings is not None:
        prompts = [prompt + first for prompt, first in zip(prompts, beginnings, strict=True)]
    generations = generate(
        model,
        processes.share(prompts),
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_token_id,
        batch_size=batch_size,
    )
    texts = [decode(tokenizer, generation.ids) for generation in generations]
    thinking = "forced" if forced_steps is not None else "latent" if latent else "text"
    own = processes.share(rows)
    verdicts = [judge(row.answer, text, thinking) for row, text in zip(own, texts, strict=True)]
    lengths = [reasoning_length(text, tokenizer, latent, forced_steps)[0] for text in texts]
    verdicts, lengths = processes.gather(verdicts), processes.gather(lengths)
    return {
        "validation_accuracy": sum(verdict.correct for verdict in verdicts) / len(rows),
        "validation_reasoning_tokens": sum(lengths) / len(rows),
        "validation_badly_formatted": sum(not v.well_formatted for v in verdicts) / len(rows),
        "validation_rows": len(rows),
    }


def reasoning_length(
    text: str, tokenizer: PreTrainedTokenizerBase, latent: bool, forced_steps: int | None
) -> tuple[int, int]:
    """Reasoning tokens and latent steps of a completion; all of it counts where no answer comes.

    A latent model's reasoning is START, CONTINUE and STOP (conformance note 16: n + 2), of which
    the first START stands in the prompt; a plain model's is the tokens of the text before
    ` The answer is:`.
    """
    if forced_steps is not None:
        return (forced_steps + 2 if latent else 0), forced_steps
    parts = split_completion(text)
    reasoning = text if parts is None else parts[0]
    if not latent:
        return len(tokenizer(reasoning, add_special_tokens=False)["input_ids"]), 0
    steps = reasoning.count(CONTINUE)
    return 1 + reasoning.count(START) + steps + reasoning.count(STOP), steps
