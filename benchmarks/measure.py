"""Seconds, throughput, memory and FLOPs of a workload's two paths, and the table of them."""

from __future__ import annotations

import csv
import io
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import flops
from benchmarks.inputs import Inputs
from benchmarks.workloads import Run, Workload, build_workloads
from latent_reasoning.runtime.device import set_threads

PATHS = ("naive", "fast")
Build = Callable[[], Inputs]
"""Makes the inputs, in another process where memory is measured: it can be pickled."""


@dataclass(frozen=True)
class Figure:
    """One line of the summary. `ratio` is how many times better the fast path is: naive / fast of
    seconds, memory and FLOPs, fast / naive of what is done a second."""

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
        work = run(repetition)
        self.seconds.append(time.perf_counter() - start)
        self.tokens.append(work.tokens)

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


def flop_figures(
    workload: Workload, repetition: int, seconds: Figure, peak_tflops: float | None = None
) -> list[Figure]:
    """What one more run of each path executes, against the minimum and by the second.

    `seconds` are the medians that the paths take, `peak_tflops` what the hardware could do. Where
    the paths write, `equal_answers` says how many texts there are and how many came out the same:
    float32 rounds differently in batches of other shapes, so that a tie may break the other way.
    """
    works, executed = {}, []
    for path in PATHS:

        def run(path: str = path) -> None:
            works[path] = getattr(workload, path)(repetition)

        executed.append(flops.executed(run) / 1e9)
    least = [workload.minimum(works[path]) / 1e9 for path in PATHS]
    rates = executed[0] / seconds.naive, executed[1] / seconds.fast
    figures = [
        Figure(workload.name, "gflop", *executed),
        Figure(workload.name, "gflop_over_minimum", executed[0] / least[0], executed[1] / least[1]),
        Figure(workload.name, "gflop_per_second", *rates, more_is_better=True),
    ]
    if peak_tflops is not None:
        shares = (rate / (1000 * peak_tflops) for rate in rates)
        figures.append(Figure(workload.name, "share_of_peak", *shares, more_is_better=True))
    naive, fast = (list(map(tuple, works[path].written)) for path in PATHS)
    if naive:
        equal = sum(own == other for own, other in zip(naive, fast, strict=True))
        figures.append(Figure(workload.name, "equal_answers", len(naive), equal, True))
    return figures


def memory_figure(workload: str, build: Build) -> Figure:
    """Peak memory (MiB) of a workload, each path once in a process of its own."""
    return Figure(workload, "peak_memory_mib", *(peak_of(workload, path, build) for path in PATHS))


def peak_of(workload: str, path: str, build: Build) -> float:
    """Peak memory (MiB) of a process that runs one path of a workload once, libraries included."""
    # A server that has imported the libraries forks each process, in a fraction of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.workloads"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_run_once, workload, path, build).result()


def _run_once(workload: str, path: str, build: Build) -> float:
    set_threads(1)
    (built,) = build_workloads(build(), [workload])
    getattr(built, path)(0)
    return peak_memory_mib()


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
        values = [f"{value:.6g}" for value in (figure.naive, figure.fast, figure.ratio)]
        writer.writerow([figure.workload, figure.metric, *values])
    return stream.getvalue()


def as_table(figures: Sequence[Figure]) -> str:
    """The same for reading."""
    lines = [f"{'workload':20} {'metric':23} {'naive':>10} {'fast':>10} {'ratio':>7}"]
    for figure in figures:
        values = f"{figure.naive:10.5g} {figure.fast:10.5g} {figure.ratio:6.2f}x"
        lines.append(f"{figure.workload:20} {figure.metric:23} {values}")
    return "\n".join(lines)
