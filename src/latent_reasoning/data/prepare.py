"""The stage prepare_data: from raw rows to `sft`, `rl`, `validation` and `test`.

In this order: read and check; shuffle and cut train into SFT's and RL's part; in each part drop
answers that are no plain number and questions that occur in validation or test; add perturbed
copies. Validation and test stay as they are. The summary says what was dropped, and why, and how
many answers of the other rows are no plain numbers. Extra test sets are prepared one by one, so
that a new one touches nothing that training reads.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from latent_reasoning.config import Data, NumberRule
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.answers import is_plain_number
from latent_reasoning.data.perturbation import perturbed_copies
from latent_reasoning.data.rows import DataError, Row, normalise_question, row_lines
from latent_reasoning.data.sources import Log, RawSplit, read_splits, read_test_set
from latent_reasoning.runtime.files import atomic_file, write_json, write_text_atomically

BAD_ROW = "bad_row"
NOT_A_NUMBER = "answer_not_a_number"
IN_HELD_OUT = "in_validation_or_test"
NOT_PLAIN = "answers_not_plain_numbers"
WORDS_PER_BIN = 10
CHARACTERS_PER_BIN = 50


@dataclass(frozen=True)
class Prepared:
    """The splits that later stages read, and the summary of how they were made."""

    splits: dict[str, list[Row]]
    summary: dict[str, Any]


def prepare(data: Data, log: Log) -> Prepared:
    """Read, split, filter and augment as configured.

    Raises:
        DataError: rows that cannot be used, or a split that is empty in the end.
    """
    raw = read_splits(data, log)
    train = raw.pop("train")
    held_out = questions_of(raw["validation"].rows, raw["test"].rows)
    splits: dict[str, list[Row]] = {}
    summaries: dict[str, Any] = {"train": _counts(train.rows, _bad_rows(train))}
    for name, positions in zip(
        ("sft", "rl"),
        split_positions(len(train.rows), data.sft_share, data.split_seed),
        strict=True,
    ):
        part = [train.rows[position] for position in positions]
        splits[name], dropped = trainable(part, held_out, data.number_rule)
        if dropped[IN_HELD_OUT] and data.source == "generated":
            raise DataError(
                f"{dropped[IN_HELD_OUT]} generated training questions also stand in validation or "
                "test: the generator is broken"
            )
        summaries[name] = _counts(splits[name], dropped)
    _refuse_empty(splits, summaries, data)
    if data.augmentation.method == "numeric_perturbation":
        taken = questions_of(*splits.values(), *(split.rows for split in raw.values()))
        _augment(splits, summaries, taken, data, log)
    for name, split in raw.items():
        splits[name] = split.rows
        summaries[name] = _held_out_counts(split)
    for name, rows in splits.items():
        summaries[name].update(_histograms(rows))
    return Prepared(splits, {**_source(data), "splits": summaries})


def split_positions(n_rows: int, sft_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of SFT's and RL's rows, in their order, int64 (docs/method.md, section 2).

    The shuffle is that of `datasets.Dataset.shuffle` (note 4 there), done before any filter; SFT
    takes the first `round(sft_share * n_rows)`, half to even.
    """
    order = np.random.default_rng(seed).permutation(n_rows)
    n_sft = round(sft_share * n_rows)
    return order[:n_sft], order[n_sft:]


def trainable(
    rows: Iterable[Row], held_out: set[str], rule: NumberRule = "exact"
) -> tuple[list[Row], Counter[str]]:
    """Rows to train on, and the number of dropped ones by reason.

    An answer must be a plain number, and a normalised question must not be in `held_out`. Negative
    answers stay: latent SFT alone drops them.
    """
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not is_plain_number(row.answer, rule):
            dropped[NOT_A_NUMBER] += 1
        elif normalise_question(row.question) in held_out:
            dropped[IN_HELD_OUT] += 1
        else:
            kept.append(row)
    return kept, dropped


def questions_of(*splits: Iterable[Row]) -> set[str]:
    """The normalised questions of some splits."""
    return {normalise_question(row.question) for rows in splits for row in rows}


def prepare_test_set(data: Data, name: str, trained: set[str], log: Log) -> Prepared:
    """Read one of `data.extra_tests`, and count its questions that are among `trained` ones.

    Raises:
        DataError: rows that cannot be used, or none.
    """
    raw = read_test_set(data, name, log)
    summary = _held_out_counts(raw)
    summary["questions_also_in_train"] = sum(
        normalise_question(row.question) in trained for row in raw.rows
    )
    return Prepared({name: raw.rows}, {"splits": {name: summary | _histograms(raw.rows)}})


def write(prepared: Prepared, layout: Layout, summary_file: Path) -> None:
    """Write each split, its SHA-256 beside it, and last the summary; every file atomically."""
    summary = prepared.summary
    for name, rows in prepared.splits.items():
        digest = hashlib.sha256()
        with (
            atomic_file(layout.data(name)) as temporary,
            temporary.open("w", encoding="utf-8", newline="\n") as file,
        ):
            for line in row_lines(rows):
                file.write(line)
                digest.update(line.encode())
        write_text_atomically(layout.data_digest(name), digest.hexdigest() + "\n")
        summary["splits"][name]["sha256"] = digest.hexdigest()
    write_json(summary_file, summary)


def _refuse_empty(splits: dict[str, list[Row]], summaries: dict[str, Any], data: Data) -> None:
    for name, rows in splits.items():
        if not rows and not (name == "rl" and data.sft_share == 1.0):
            raise DataError(
                f"the split {name} has no rows left: dropped {summaries[name]['dropped']}; train "
                f"has {summaries['train']['rows']} rows, of which sft gets data.sft_share = "
                f"{data.sft_share:g}"
            )


def _augment(
    splits: dict[str, list[Row]],
    summaries: dict[str, Any],
    taken: set[str],
    data: Data,
    log: Log,
) -> None:
    """Append perturbed copies to the split of their row, so that SFT and RL stay apart."""
    settings = data.augmentation
    for name in ("sft", "rl"):
        copies = perturbed_copies(splits[name], settings.copies, settings.seed, taken)
        parents = {copy.id.rsplit("-copy-", 1)[0] for copy in copies}
        summaries[name]["perturbed_rows"] = len(parents)
        summaries[name]["perturbed_copies"] = len(copies)
        log(f"{name}: {len(copies)} perturbed copies of {len(parents)} of {len(splits[name])} rows")
        splits[name] = splits[name] + copies
        summaries[name]["rows"] = len(splits[name])


def _bad_rows(split: RawSplit) -> Counter[str]:
    return Counter({BAD_ROW: split.bad_rows} if split.bad_rows else {})


def _counts(rows: Sequence[Row], dropped: Counter[str]) -> dict[str, Any]:
    return {"rows": len(rows), "dropped": dict(sorted(dropped.items()))}


def _held_out_counts(split: RawSplit) -> dict[str, Any]:
    """The counts of rows that no filter reads."""
    counts = _counts(split.rows, _bad_rows(split))
    return counts | ({NOT_PLAIN: split.not_plain} if split.not_plain else {})


def _source(data: Data) -> dict[str, Any]:
    if data.source == "hub":
        configured = {} if data.hub_config is None else {"hub_config": data.hub_config}
        return {"source": "hub", "hub_id": data.hub_id, **configured, "revision": data.revision}
    return {"source": data.source}


def _histograms(rows: Sequence[Row]) -> dict[str, Any]:
    """Lengths of the questions, and numbers of steps (`unknown` for a row without given steps)."""
    steps = Counter("unknown" if row.steps is None else len(row.steps) for row in rows)
    return {
        "steps": {
            str(count): steps[count]
            for count in sorted(steps, key=lambda c: (str(c) == "unknown", c))
        },
        "question_words": _distribution((len(row.question.split()) for row in rows), WORDS_PER_BIN),
        "question_characters": _distribution(
            (len(row.question) for row in rows), CHARACTERS_PER_BIN
        ),
    }


def _distribution(values: Iterable[int], bin_width: int) -> dict[str, Any]:
    """Least, mean and largest value, and counts by the first value of each bin."""
    values = list(values)
    if not values:
        return {"bin_width": bin_width, "histogram": {}}
    bins = Counter(value // bin_width * bin_width for value in values)
    return {
        "min": min(values),
        "mean": round(fmean(values), 2),
        "max": max(values),
        "bin_width": bin_width,
        "histogram": {str(start): bins[start] for start in sorted(bins)},
    }
