"""Greedy validation during training: accuracy and length on rows of the validation split."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.answers import judge
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import ANSWER_WORDS, COLON, encode_prompts
from latent_reasoning.model.generation import Generation, generate
from latent_reasoning.model.reasoner import LatentReasoner


def greedy_validation(
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    prefix: str,
    max_new_tokens: int,
    batch_size: int,
    forced_steps: int | None = None,
) -> dict[str, float]:
    """Decode every row greedily; `prefix` stands before the question in the prompt.

    Returns `validation_accuracy`, `validation_reasoning_tokens` (mean) and
    `validation_badly_formatted` (share). A latent model thinks, `forced_steps` steps where given.
    """
    latent = model.settings is not None
    prompts = encode_prompts(
        rows, tokenizer, prefix=prefix, latent=latent, forced_steps=forced_steps
    )
    generations = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_token_id,
        batch_size=batch_size,
        forced=forced_steps is not None,
    )
    thinking = "forced" if forced_steps is not None else "latent" if latent else "text"
    verdicts = [
        judge(row.answer, tokenizer.decode(generation.ids), thinking)
        for row, generation in zip(rows, generations, strict=True)
    ]
    prefix_ids = tokenizer(ANSWER_WORDS + COLON, add_special_tokens=False)["input_ids"]
    lengths = [
        forced_steps + 2
        if forced_steps is not None
        else generation.latent_steps + 2
        if latent
        else _text_reasoning_tokens(generation, prefix_ids)
        for generation in generations
    ]
    count = len(rows)
    return {
        "validation_accuracy": sum(v.correct for v in verdicts) / count,
        "validation_reasoning_tokens": sum(lengths) / count,
        "validation_badly_formatted": sum(not v.well_formatted for v in verdicts) / count,
    }
