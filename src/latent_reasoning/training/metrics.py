"""What a training reports: `metrics.jsonl`, its table, and progress lines for people."""

from __future__ import annotations

import csv
import datetime
import json
import math
import time
from pathlib import Path
from typing import TextIO

from latent_reasoning.runtime.files import atomic_file, write_json_lines
from latent_reasoning.runtime.tracking import Tracker
from latent_reasoning.training.checkpoints import Log, Progress

PROGRESS_SECONDS = 10.0


class MetricsLog:
    """`metrics.jsonl`: a JSON object per logged step, which the tracker gets too.

    On resume, lines after the checkpoint are cut off, because those steps are computed again. Times
    are left out, so that equal trainings give equal files. `writes` is True in one process only.
    """

    def __init__(self, path: Path, progress: Progress, tracker: Tracker, *, writes: bool) -> None:
        self.path = path
        self.tracker = tracker
        self.writes = writes
        self.stream: TextIO | None = None
        self.rewind(progress)

    def rewind(self, progress: Progress) -> None:
        """Continue from `progress`; lines of later steps are cut off."""
        self.close()
        self.progress = progress
        if self.writes:
            kept = [row for row in read_metrics(self.path) if row["step"] <= progress.step]
            write_json_lines(self.path, kept)
            self.stream = self.path.open("a", encoding="utf-8")

    def add(self, values: dict[str, float]) -> None:
        """Count one step's values for the next mean."""
        window = self.progress.window
        for name, value in values.items():
            window[name] = window.get(name, 0.0) + value
        self.progress.window_steps += 1

    def flush(self) -> dict[str, float]:
        """Log the means over the steps since the last flush; returns them."""
        count = self.progress.window_steps
        means = {name: total / count for name, total in self.progress.window.items()}
        self.progress.window, self.progress.window_steps = {}, 0
        self.write(means)
        return means

    def write(self, values: dict[str, float]) -> None:
        """Log values of the current step."""
        if values and self.stream is not None:
            self.stream.write(json.dumps({"step": self.progress.step, **values}) + "\n")
            self.stream.flush()
            self.tracker.log_metrics(values, self.progress.step)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, up to the first unfinished or damaged line."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows.append({"step": int(row["step"]), **row})
            except (ValueError, TypeError, KeyError):
                break
    return rows


def write_training_csv(metrics: Path, path: Path) -> None:
    """`metrics.jsonl` as a table: a row per step, a column per metric, empty where not measured."""
    by_step: dict[float, dict[str, float]] = {}
    for row in read_metrics(metrics):
        by_step.setdefault(row["step"], {}).update(row)
    columns = dict.fromkeys(["step", *(name for row in by_step.values() for name in row)])
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(by_step.values())


class ProgressLines:
    """Plain lines on a training's progress, readable in a terminal and in a log file."""

    def __init__(self, name: str, steps: int, first_step: int, log: Log) -> None:
        self.name, self.steps, self.first_step, self.log = name, steps, first_step, log
        self.started = time.monotonic()
        self.printed = -math.inf
        self.means: dict[str, float] = {}

    def loss(self, step: int, means: dict[str, float]) -> None:
        """Print the loss and its parts, at most every `PROGRESS_SECONDS`."""
        self.means = means
        if time.monotonic() - self.printed >= PROGRESS_SECONDS:
            self._print(step, means)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Print loss (where one was logged already), accuracy and length, always."""
        self._print(step, {n: v for n, v in self.means.items() if n == "loss"} | values)

    def _print(self, step: int, values: dict[str, float]) -> None:
        self.printed = time.monotonic()
        elapsed = self.printed - self.started
        seconds = elapsed / max(1, step - self.first_step) * (self.steps - step)
        left = datetime.timedelta(seconds=round(seconds))
        text = "  ".join(_readable(name, value) for name, value in values.items())
        self.log(f"{self.name}  step {step}/{self.steps}  {text}  {left} left")


def _readable(name: str, value: float) -> str:
    name = name.removeprefix("validation_").replace("_", " ")
    return f"{name} {value:.2e}" if 0 < abs(value) < 1e-3 else f"{name} {value:.4g}"
