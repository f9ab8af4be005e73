"""Styles of reasoning text: full equations, results alone, or with steps left out.

A pretrained language model has seen terse and verbose working; a base trained from scratch gets
both from here (`base.texts`), and so may the teacher of latent SFT (`teacher_texts`). Each row has
one style, a function of the seed and the row's id: the same text is read in every epoch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from latent_reasoning.config import ReasoningMix
from latent_reasoning.data.dial.problems import PretrainingStyle, pretraining_reasoning
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import reasoning_text
from latent_reasoning.runtime import seeds

GENERATOR_STYLES: dict[str, PretrainingStyle] = {
    "full": "full",
    "results_only": "results_only",
    "drop_last": "last_step_dropped",
    "truncated": "truncated",
    "results_only_drop_last": "results_only_last_step_dropped",
    "results_only_truncated": "results_only_truncated",
    "results_only_waiting": "results_only_waiting",
}


def styled_reasonings(
    rows: Sequence[Row],
    mix: ReasoningMix,
    *,
    seed: int,
    natural_language: bool = False,
    drop_last_step: bool = False,
) -> list[str]:
    """The reasoning text of each row, in a style drawn from `mix`.

    `drop_last_step` removes the last step beforehand, whatever the style. Raises `DataError` for a
    row without steps, or one whose steps are not equations where results alone are asked for.
    """
    shares = mix.model_dump()
    if shares["full"] and not any(share for name, share in shares.items() if name != "full"):
        return [
            reasoning_text(row, natural_language=natural_language, drop_last_step=drop_last_step)
            for row in rows
        ]
    if natural_language:
        raise DataError("styles other than full need steps that are equations, not sentences")
    return [_styled(row, shares, seed, drop_last_step) for row in rows]


def _styled(row: Row, shares: dict[str, float], seed: int, drop_last_step: bool) -> str:
    if row.steps is None:
        raise DataError(f"row {row.id} has no steps: only the form no_cot can use it")
    steps = list(row.steps[:-1] if drop_last_step else row.steps)
    generator = random.Random(seeds.seed_for(seed, seeds.TEXT_STYLE.format(row=row.id)))
    (name,) = generator.choices(list(shares), weights=list(shares.values()))
    if not steps:
        # There is nothing to cut off or to repeat.
        name = name.replace("_truncated", "").replace("truncated", "full").replace("_waiting", "")
    styled = {"question": row.question, "steps": steps, "answer": row.answer}
    try:
        return pretraining_reasoning(styled, GENERATOR_STYLES[name], generator)
    except ValueError as error:
        raise DataError(f"row {row.id}: {error}") from None
