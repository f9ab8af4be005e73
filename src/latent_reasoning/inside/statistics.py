"""Shares, paired differences and areas under curves, each with its 95 % interval.

Bootstraps resample rows, with a fixed seed: equal input gives equal intervals.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy
import pandas
from numpy.typing import ArrayLike, NDArray

from latent_reasoning.evaluation.metrics import PairedCounts, wilson_interval

RESAMPLES = 1000
SEED = 0
FEWEST = 10
"""Right and wrong rows that an area's interval needs, at least."""


def by_operations(table: pandas.DataFrame) -> Iterator[tuple[int, pandas.DataFrame]]:
    """All rows of a table as K = 0, and those of each K apart.

    Rows that state no equations have `operations` 0 too; they count among all rows alone.
    """
    yield 0, table
    yield from table[table["operations"] > 0].groupby("operations")


def share(hits: ArrayLike) -> dict[str, float | int]:
    """`n, correct, accuracy` and the Wilson interval `low, high`; no rows: nan."""
    hits = numpy.asarray(hits, dtype=bool)
    n, correct = len(hits), int(hits.sum())
    low, high = wilson_interval(correct, n) if n else (numpy.nan, numpy.nan)
    accuracy = correct / n if n else numpy.nan
    return {"n": n, "correct": correct, "accuracy": accuracy, "low": low, "high": high}


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """The mean of one number a row and its bootstrap interval."""
    mean, low, high = mean_intervals(numpy.asarray(values, dtype=float)[:, None])[:, 0].tolist()
    return mean, low, high


def mean_intervals(values: NDArray) -> NDArray:
    """Mean, low and high (3, M) of M numbers a row, (n, M), over the same resampled rows."""
    if not len(values):
        return numpy.full((3, values.shape[1]), numpy.nan)
    means = _resampled(len(values)) @ values / len(values)
    return numpy.vstack([values.mean(0), *numpy.quantile(means, (0.025, 0.975), axis=0)])


def difference(values: ArrayLike) -> dict[str, float]:
    """The mean of the rows' differences, with its interval."""
    names = ("difference", "difference_low", "difference_high")
    return dict(zip(names, mean_interval(values), strict=True))


def paired(after: ArrayLike, before: ArrayLike) -> dict[str, float]:
    """The difference of two shares of the same rows, its interval, and McNemar's exact p."""
    after, before = numpy.asarray(after, dtype=bool), numpy.asarray(before, dtype=bool)
    p_mcnemar = PairedCounts.of(after, before).p_mcnemar
    return difference(after.astype(float) - before) | {"p_mcnemar": p_mcnemar}


def auc(score: ArrayLike, right: ArrayLike) -> tuple[float, float, float]:
    """How often a right row has the higher score than a wrong one (ties: half), with an interval.

    nan where all rows are right, or all wrong; no interval with fewer than `FEWEST` of either: so
    few rows would only be drawn again and again.
    """
    score, right = numpy.asarray(score, dtype=float), numpy.asarray(right, dtype=bool)
    if right.all() or not right.any():
        return (numpy.nan,) * 3
    above, below = score[right][:, None], score[~right]
    wins = (above > below) + 0.5 * (above == below)
    if min(right.sum(), (~right).sum()) < FEWEST:
        return float(wins.mean()), numpy.nan, numpy.nan
    weights = _resampled(len(score))
    ups, downs = weights[:, right], weights[:, ~right]
    pairs = ups.sum(1) * downs.sum(1)
    areas = ((ups @ wins) * downs).sum(1)[pairs > 0] / pairs[pairs > 0]
    low, high = numpy.quantile(areas, (0.025, 0.975))
    return float(wins.mean()), float(low), float(high)


@functools.lru_cache(maxsize=16)
def _resampled(n: int) -> NDArray:
    """How often each of n rows is drawn in each resample, (RESAMPLES, n)."""
    return numpy.random.default_rng(SEED).multinomial(n, [1 / n] * n, size=RESAMPLES).astype(float)
