"""The results of an evaluation: its predictions, its accuracies at forced lengths, and their files.

A folder holds `summary.json`, `predictions.parquet` (one row per example), `forced.csv` (accuracy
at every forced number of latent steps), `by_steps.csv` (accuracy and length by difficulty) and
`SHA256SUMS`, which the analysis checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from latent_reasoning.evaluation import metrics
from latent_reasoning.runtime.files import atomic_directory, write_json, write_sums


@dataclass(frozen=True)
class Prediction:
    """One evaluated example.

    `completion` is the generated text, special tokens included; `extracted` the number read as
    its answer, None if there is none. `reasoning_tokens` is n + 2 for a latent model that
    stopped (START, n CONTINUE, STOP) and the tokens before ` The answer is:` for a plain one;
    `latent_steps` is n, 0 for a plain model. `gold_steps` is the number of reasoning steps of the
    data, None if the row has none; `searched` the number of other texts that a search has written
    to find this one.
    """

    id: str
    question: str
    answer: str
    completion: str
    extracted: str | None
    correct: bool
    well_formatted: bool
    cut_off: bool
    reasoning_tokens: int
    latent_steps: int
    gold_steps: int | None
    searched: int = 0


TYPES = {
    "id": "str",
    "question": "str",
    "answer": "str",
    "completion": "str",
    "extracted": "str",
    "correct": "bool",
    "well_formatted": "bool",
    "cut_off": "bool",
    "reasoning_tokens": "int64",
    "latent_steps": "int64",
    "gold_steps": "Int64",
}
"""Column types of `predictions.parquet`, in order."""


@dataclass(frozen=True)
class ForcedPoint:
    """Accuracy over `n` rows that all take `latent_steps` steps."""

    latent_steps: int
    n: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


@dataclass(frozen=True)
class Evaluation:
    """One model on one data set; `seconds` is the wall time of the pass over all rows."""

    predictions: list[Prediction]
    forced: list[ForcedPoint]
    seconds: float

    def frame(self) -> pandas.DataFrame:
        """The rows of `predictions.parquet`; `searched` is there only where there was a search."""
        rows = [dataclasses.asdict(prediction) for prediction in self.predictions]
        searched = any(prediction.searched for prediction in self.predictions)
        types = TYPES | ({"searched": "int64"} if searched else {})
        return pandas.DataFrame(rows, columns=list(types)).astype(types)

    def forced_frame(self) -> pandas.DataFrame:
        """The rows of `forced.csv`."""
        rows = [dataclasses.asdict(point) | {"accuracy": point.accuracy} for point in self.forced]
        return pandas.DataFrame(rows, columns=["latent_steps", "n", "correct", "accuracy"])


def write_evaluation(
    folder: Path, evaluation: Evaluation, science: Mapping[str, Any] | None = None
) -> dict:
    """Write the files of an evaluation as one folder, atomically; returns the summary.

    `summary.json` also records `science`, the keys of the configuration that it depends on.
    """
    predictions = evaluation.frame()
    summary = metrics.summarise(predictions, evaluation.seconds)
    with atomic_directory(folder) as temporary:
        predictions.to_parquet(temporary / "predictions.parquet", index=False)
        evaluation.forced_frame().to_csv(temporary / "forced.csv", index=False)
        metrics.by_steps(predictions).to_csv(temporary / "by_steps.csv", index=False)
        write_json(temporary / "summary.json", summary | ({"science": science} if science else {}))
        write_sums(temporary)
    return summary


def summary_text(title: str, summary: dict) -> str:
    """The summary of an evaluation for a reader, in per cent."""
    low, high = summary["accuracy_ci95"]
    return "\n".join(
        (
            title,
            f"  accuracy          {100 * summary['accuracy']:.2f} % "
            f"({summary['correct']} of {summary['n']}; "
            f"95 % interval {100 * low:.2f} to {100 * high:.2f})",
            f"  reasoning tokens  {summary['reasoning_tokens_mean']:.2f} "
            f"(std {summary['reasoning_tokens_std']:.2f}, "
            f"{summary['reasoning_tokens_min']} to {summary['reasoning_tokens_max']})",
            f"  badly formatted   {summary['badly_formatted']}",
            f"  cut off           {summary['cut_off']}",
            f"  seconds           {summary['seconds']:.1f}",
        )
    )
