"""Seconds, throughput and memory of a workload's two paths, and the table of them."""

from __future__ import annotations

import csv
import io
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.workloads import Run, Workload
from latent_reasoning.config import PROJECT_ROOT

PATHS = ("naive", "fast")


@dataclass(frozen=True)
class Figure:
    """One line of the summary. `ratio` is how many times better the fast path is: naive / fast of
    seconds and memory, fast / naive of examples and tokens a second."""

    workload: str
    metric: str
    naive: float
    fast: float
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        return self.fast / self.naive if self.more_is_better else self.naive / self.fast


@dataclass
class _Timings:
    """Of one path: seconds and real tokens of each repetition."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, run: Run, repetition: int) -> None:
        start = time.perf_counter()
        tokens = run(repetition)
        self.seconds.append(time.perf_counter() - start)
        self.tokens.append(tokens)

    def tokens_per_second(self) -> float:
        pairs = zip(self.tokens, self.seconds, strict=True)
        return statistics.median(tokens / seconds for tokens, seconds in pairs)


def time_workload(workload: Workload, repetitions: int) -> list[Figure]:
    """Both paths in turn, naive, fast, naive, fast, .. after one run of each as warm-up."""
    timings = {path: _Timings() for path in PATHS}
    for repetition in range(repetitions + 1):
        for path in PATHS:
            timings[path].add(getattr(workload, path), repetition)
        if repetition == 0:
            timings = {path: _Timings() for path in PATHS}
    naive, fast = timings["naive"], timings["fast"]
    seconds = [statistics.median(timing.seconds) for timing in (naive, fast)]
    return [
        Figure(workload.name, "seconds", *seconds),
        Figure(workload.name, "seconds_min", min(naive.seconds), min(fast.seconds)),
        Figure(workload.name, "seconds_max", max(naive.seconds), max(fast.seconds)),
        Figure(
            workload.name,
            "examples_per_second",
            *(workload.examples / value for value in seconds),
            more_is_better=True,
        ),
        Figure(
            workload.name,
            "real_tokens_per_second",
            naive.tokens_per_second(),
            fast.tokens_per_second(),
            more_is_better=True,
        ),
    ]


def memory_figure(workload: str, arguments: Sequence[str]) -> Figure:
    """Peak memory (MiB) of a workload, each path once in a process of its own.

    `arguments` choose shape and batches as they were given to this process.
    """
    peaks = []
    for path in PATHS:
        command = [sys.executable, "-m", "benchmarks", *arguments, "--memory-of", workload, path]
        result = subprocess.run(
            command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        peaks.append(float(result.stdout))
    return Figure(workload, "peak_memory_mib", *peaks)


def peak_memory_mib() -> float:
    """The most memory that this process ever held, libraries and weights included.

    Linux carries `ru_maxrss` over from the process that started this one, so that its own status
    is read where there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
        if peak:
            return int(peak[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def as_csv(figures: Sequence[Figure]) -> str:
    """The summary: `workload,metric,naive,fast,ratio`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["workload", "metric", "naive", "fast", "ratio"])
    for figure in figures:
        values = (f"{value:.6g}" for value in (figure.naive, figure.fast, figure.ratio))
        writer.writerow([figure.workload, figure.metric, *values])
    return stream.getvalue()


def as_table(figures: Sequence[Figure]) -> str:
    """The same for reading."""
    lines = [f"{'workload':20} {'metric':23} {'naive':>10} {'fast':>10} {'ratio':>7}"]
    for figure in figures:
        values = f"{figure.naive:10.4g} {figure.fast:10.4g} {figure.ratio:6.2f}x"
        lines.append(f"{figure.workload:20} {figure.metric:23} {values}")
    return "\n".join(lines)
