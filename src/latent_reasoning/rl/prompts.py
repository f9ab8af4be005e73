"""The prompts of RL: questions to sample answers to, each with its right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import NumberRule
from latent_reasoning.data.answers import START, parse_number
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import encode_prompts


@dataclass(frozen=True)
class RlPrompt:
    """A question to sample answers to: its ids, its text, the right answer and how it is read."""

    ids: list[int]
    text: str
    label: str
    number_rule: NumberRule = "exact"


def rl_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    max_prompt_tokens: int | None,
    number_rule: NumberRule = "exact",
    latent: bool = True,
    suffix: str = "",
) -> list[RlPrompt]:
    """The rows as prompts, which end in START for a `latent` model; those with more tokens than the
    limit are dropped.

    `prefix` and `suffix` stand around each question.

    Raises `DataError` for an answer without a number, or where no prompt is left.
    """
    for row in rows:
        label_number(row.answer, f"row {row.id}", number_rule)
    encoded = encode_prompts(rows, tokenizer, prefix=prefix, latent=latent, suffix=suffix)
    end = START if latent else ""
    prompts = [
        RlPrompt(ids, prefix + row.question + suffix + end, row.answer, number_rule)
        for row, ids in zip(rows, encoded, strict=True)
        if max_prompt_tokens is None or len(ids) <= max_prompt_tokens
    ]
    if not prompts:
        raise DataError(
            f"all {len(rows)} prompts are longer than max_prompt_tokens: {max_prompt_tokens} allows"
        )
    return prompts


def label_number(label: str, where: str, rule: NumberRule = "exact") -> float:
    """The number in a label; `DataError` naming the row where it holds none.

    The public code's filter keeps `nan`, which equals no number: such a row is refused when the
    prompts are read, before any training.
    """
    number = parse_number(label, rule)
    if number is None:
        raise DataError(f"{where}: the answer {label!r} holds no number to compare with")
    return number
