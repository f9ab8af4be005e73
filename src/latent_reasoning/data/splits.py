"""Which training rows are SFT's, which RL's, and which are dropped (docs/method.md, section 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from latent_reasoning.data.answers import is_negative, is_plain_number
from latent_reasoning.data.rows import Row, normalise_question

NOT_A_NUMBER = "answer_not_a_number"
NEGATIVE = "negative_answer"
IN_HELD_OUT = "in_validation_or_test"


def split_positions(n_rows: int, sft_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of SFT's and RL's rows, in their order, int64.

    The shuffle is that of `datasets.Dataset.shuffle` (conformance note 4), done before any filter;
    SFT takes the first `round(sft_share * n_rows)`, half to even.
    """
    order = np.random.default_rng(seed).permutation(n_rows)
    n_sft = round(sft_share * n_rows)
    return order[:n_sft], order[n_sft:]


def keep_numeric(rows: Iterable[Row], *, drop_negative: bool) -> tuple[list[Row], Counter[str]]:
    """Training rows whose answer is a plain number, and the dropped ones counted by reason.

    `drop_negative` also drops negative answers (latent SFT).
    """
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not is_plain_number(row.answer):
            dropped[NOT_A_NUMBER] += 1
        elif drop_negative and is_negative(row.answer):
            dropped[NEGATIVE] += 1
        else:
            kept.append(row)
    return kept, dropped


def questions_of(*splits: Iterable[Row]) -> set[str]:
    """The normalised questions of some splits."""
    return {normalise_question(row.question) for rows in splits for row in rows}


def keep_unseen(rows: Iterable[Row], held_out: set[str]) -> tuple[list[Row], Counter[str]]:
    """Training rows whose question is none of `held_out` (normalised), and the count of others."""
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if normalise_question(row.question) in held_out:
            dropped[IN_HELD_OUT] += 1
        else:
            kept.append(row)
    return kept, dropped
