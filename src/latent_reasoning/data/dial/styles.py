"""Styles of reasoning text: full equations, results alone, or with steps left out.

A pretrained language model has seen verbose and terse working, and working that leaves steps out; a
base trained from scratch gets all of them from here (`base.texts`), and so may the teacher of
latent SFT (`teacher_texts`). Each row has one style, a function of the seed and the row's id: the
same text is read in every epoch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from latent_reasoning.config import ReasoningMix
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import reasoning_steps, reasoning_text
from latent_reasoning.runtime import seeds

RESULTS_PREFIX = " Results:"
RESULTS_END = "."
MOST_RESULTS = 10

Steps = Sequence[str]


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
    row without steps, or whose steps are not equations if only their results are wanted.
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
    steps = reasoning_steps(row, drop_last_step=drop_last_step)
    generator = random.Random(seeds.seed_for(seed, seeds.TEXT_STYLE.format(row=row.id)))
    (name,) = generator.choices(list(shares), weights=list(shares.values()))
    shorten, write = STYLES[name]
    try:
        return write(shorten(steps, generator))
    except ValueError as error:
        raise DataError(f"row {row.id}: {error}") from None


def _all(steps: Steps, generator: random.Random) -> Steps:
    return steps


def _all_but_the_last(steps: Steps, generator: random.Random) -> Steps:
    return steps[:-1]


def _truncated(steps: Steps, generator: random.Random) -> Steps:
    """The first `j` steps, `j` uniform in `0 .. k - 1`."""
    return steps[: generator.randrange(len(steps))] if steps else steps


def _waiting(steps: Steps, generator: random.Random) -> Steps:
    """All k steps, the last one repeated to a length uniform in `k + 1 .. MOST_RESULTS`."""
    if not 0 < len(steps) < MOST_RESULTS:
        return steps
    return [*steps, *[steps[-1]] * generator.randint(1, MOST_RESULTS - len(steps))]


def results_only(steps: Steps) -> str:
    """The terse text of `steps`: ` Results: 5 3.` for `<<(6+6)%7=5>><<(5*2)%7=3>>`."""
    return RESULTS_PREFIX + "".join(f" {step_result(step)}" for step in steps) + RESULTS_END


def step_result(step: str) -> str:
    """The result of a step, the text between its last `=` and `>>`.

    Raises:
        ValueError: if `step` is not of the form `<<expression=result>>`.
    """
    expression, separator, result = step.rpartition("=")
    if not (separator and expression.startswith("<<") and result.endswith(">>")):
        raise ValueError(f"step {step!r} is not of the form <<expression=result>>")
    return result.removesuffix(">>")


STYLES: dict[str, tuple[Callable[[Steps, random.Random], Steps], Callable[[Steps], str]]] = {
    "full": (_all, "".join),
    "results_only": (_all, results_only),
    "drop_last": (_all_but_the_last, "".join),
    "truncated": (_truncated, "".join),
    "results_only_drop_last": (_all_but_the_last, results_only),
    "results_only_truncated": (_truncated, results_only),
    "results_only_waiting": (_waiting, results_only),
}
"""Each style of `ReasoningMix`: which steps it keeps, and how it writes them."""
