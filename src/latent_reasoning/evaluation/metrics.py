"""Lengths and statistics of an evaluation (docs/method.md, section 6), all pure functions.

Shares are fractions 0..1. A badly formatted row counts as wrong, with its length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import pandas
from numpy.typing import NDArray

from latent_reasoning.data.answers import split_completion
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.sequences import CONTINUE, START, STOP

if TYPE_CHECKING:  # seconds to import, and tables, figures and the page have no tokenizer
    from transformers import PreTrainedTokenizerBase

CONFIDENCE_95 = 1.959963984540054
"""Two-sided 95 % point of the standard normal distribution."""


def reasoning_length(
    text: str, tokenizer: PreTrainedTokenizerBase, latent: bool, forced_steps: int | None
) -> tuple[int, int]:
    """Reasoning tokens and latent steps n of a completion, all of which counts if it has no answer.

    A latent model's reasoning is START, n CONTINUE and STOP: n + 2 tokens (docs/method.md, note
    16), of which the first START stands in the prompt. A plain model's is the tokens of the text
    before ` The answer is:`, and its n is 0.
    """
    if forced_steps is not None:
        return (forced_steps + 2 if latent else 0), forced_steps
    parts = split_completion(text)
    reasoning = text if parts is None else parts[0]
    if not latent:
        return len(next(read_pieces(tokenizer, [reasoning]))), 0
    steps = reasoning.count(CONTINUE)
    return 1 + reasoning.count(START) + steps + reasoning.count(STOP), steps


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of the share `correct / n`; n must be positive."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} correct of {n} is not a share")
    z2 = CONFIDENCE_95**2
    share = correct / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = CONFIDENCE_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # If all rows agree, the bound is exactly 0 or 1; rounding would miss it by 1e-16.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return low, high


@dataclass(frozen=True)
class PairedCounts:
    """Two models on the same rows: where they agree and where only one is right."""

    n: int
    both_right: int
    only_model: int
    only_reference: int

    @classmethod
    def of(cls, model: NDArray[numpy.bool_], reference: NDArray[numpy.bool_]) -> PairedCounts:
        """The counts of two models' verdicts (n,) on the same rows, in the same order."""
        return cls(
            n=len(model),
            both_right=int((model & reference).sum()),
            only_model=int((model & ~reference).sum()),
            only_reference=int((~model & reference).sum()),
        )

    @property
    def p_mcnemar(self) -> float:
        """Two-sided exact McNemar p: a fair coin for each row that only one model gets right."""
        discordant = self.only_model + self.only_reference
        fewer = min(self.only_model, self.only_reference)
        tail = sum(math.comb(discordant, i) for i in range(fewer + 1))
        return min(1.0, 2 * tail / 2**discordant)


def paired_counts(model: pandas.DataFrame, reference: pandas.DataFrame) -> PairedCounts:
    """Compare two models' predictions row by row; both need columns `id` and `correct`.

    Raises `ValueError` if the two are not of the same rows.
    """
    ours = model.set_index("id")["correct"].astype(bool)
    theirs = reference.set_index("id")["correct"].astype(bool)
    if len(ours) != len(theirs) or set(ours.index) != set(theirs.index):
        raise ValueError("the two evaluations are not of the same rows")
    return PairedCounts.of(ours.to_numpy(), theirs.loc[ours.index].to_numpy())


def pearson(x: pandas.Series, y: pandas.Series) -> float | None:
    """Pearson's r over the rows where both are known; None if either does not vary."""
    known = x.notna() & y.notna()
    x, y = x[known].astype(float), y[known].astype(float)
    if x.nunique() < 2 or y.nunique() < 2:
        return None
    return float(x.corr(y))


def summarise(predictions: pandas.DataFrame, seconds: float) -> dict:
    """The content of `summary.json` from the rows of `predictions.parquet`.

    `reasoning_tokens_std` is the population's; `badly_formatted` and `cut_off` are counts;
    `seconds` is the wall time of the adaptive (or forced) pass over the split.
    """
    n, correct = len(predictions), int(predictions["correct"].sum())
    tokens = predictions["reasoning_tokens"]
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "accuracy_ci95": list(wilson_interval(correct, n)),
        "reasoning_tokens_mean": float(tokens.mean()),
        "reasoning_tokens_std": float(tokens.std(ddof=0)),
        "reasoning_tokens_min": int(tokens.min()),
        "reasoning_tokens_max": int(tokens.max()),
        "badly_formatted": int((~predictions["well_formatted"]).sum()),
        "cut_off": int(predictions["cut_off"].sum()),
        "seconds": seconds,
    }


def by_steps(predictions: pandas.DataFrame) -> pandas.DataFrame:
    """The content of `by_steps.csv`: a line per number of gold steps; unknown ones are left out."""
    return grouped(predictions.dropna(subset="gold_steps"), "gold_steps")


def grouped(predictions: pandas.DataFrame, key: str) -> pandas.DataFrame:
    """`key, n, correct, accuracy, reasoning_tokens_mean` for each value of an integer column."""
    groups = predictions.groupby(key)
    table = pandas.DataFrame(
        {
            "n": groups.size(),
            "correct": groups["correct"].sum().astype(int),
            "accuracy": groups["correct"].mean().astype(float),
            "reasoning_tokens_mean": groups["reasoning_tokens"].mean().astype(float),
        }
    ).reset_index()
    return table.astype({key: int})
