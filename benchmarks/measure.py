"""Seconds, throughput, FLOPs and memory of a workload's two paths."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pandas
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.inputs import Inputs
from benchmarks.workloads import Workload, build_workloads

PATHS = ("naive", "fast")
Build = Callable[[], Inputs]
"""Makes the inputs; it can be pickled, because memory is measured in another process."""


@dataclass(frozen=True)
class Measurement:
    """One line of a table; `axis` and `value` are set in the table of the scaling.

    `ratio` says how many times better the fast path is: naive / fast for seconds, memory and FLOPs,
    fast / naive for rates and equal answers.
    """

    workload: str
    metric: str
    naive: float
    fast: float
    more_is_better: bool = False
    axis: str | None = None
    value: int | None = None

    @property
    def ratio(self) -> float:
        return self.fast / self.naive if self.more_is_better else self.naive / self.fast


def time_workload(workload: Workload, repetitions: int) -> list[Measurement]:
    """Time both paths alternately, naive, fast, naive, fast, .. after one warm-up run of each."""
    rows = []
    for repetition in range(repetitions + 1):
        for path in PATHS:
            start = time.perf_counter()
            work = getattr(workload, path)(repetition)
            took = time.perf_counter() - start
            rows.append((repetition, path, took, work.tokens / took))
    table = pandas.DataFrame(rows, columns=["repetition", "path", "seconds", "rate"])
    paths = table[table["repetition"] > 0].groupby("path")
    seconds, name = paths["seconds"], workload.name
    examples = workload.examples / seconds.median()
    return [
        Measurement(name, "seconds", **seconds.median()),
        Measurement(name, "seconds_min", **seconds.min()),
        Measurement(name, "seconds_max", **seconds.max()),
        Measurement(name, "examples_per_second", **examples, more_is_better=True),
        Measurement(name, "real_tokens_per_second", **paths["rate"].median(), more_is_better=True),
    ]


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION_ON_A_CPU = {
    ATTENTION: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    ATTENTION_BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
}
"""Operations that torch's counter lacks, counted in full: causal masking saves nothing."""


def count_flops(workload: Workload, repetition: int, seconds: Measurement) -> list[Measurement]:
    """FLOPs of one more run of each path: in all, and per second at the median `seconds`.

    Where the paths write texts, `equal_answers` has the number of texts as `naive` and the number
    of equal ones as `fast`: float32 rounds differently in batches of other shapes, so that a tie
    may break the other way.
    """
    works, executed = {}, {}
    for path in PATHS:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_A_CPU) as counter:
            works[path] = getattr(workload, path)(repetition)
        executed[path] = counter.get_total_flops() / 1e9
    rates = (executed[path] / getattr(seconds, path) for path in PATHS)
    measured = [
        Measurement(workload.name, "gflop", **executed),
        Measurement(workload.name, "gflop_per_second", *rates, more_is_better=True),
    ]
    naive, fast = (list(map(tuple, works[path].written)) for path in PATHS)
    if naive:
        equal = sum(own == other for own, other in zip(naive, fast, strict=True))
        measured.append(Measurement(workload.name, "equal_answers", len(naive), equal, True))
    return measured


def measure_memory(workload: str, build: Build) -> Measurement:
    """Peak memory (MiB) of a workload; each path runs once in a process of its own."""
    peaks = (peak_of(workload, path, build) for path in PATHS)
    return Measurement(workload, "peak_memory_mib", *peaks)


def peak_of(workload: str, path: str, build: Build) -> float:
    """Peak memory (MiB) of a process that runs one path of a workload once, libraries included."""
    # A server that has imported the libraries forks each process, in a fraction of a second. (On
    # Linux, a newly started program would count the memory of the process that started it.)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.workloads"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_run_once, workload, path, build).result()


def _run_once(workload: str, path: str, build: Build) -> float:
    torch.set_num_threads(1)
    (built,) = build_workloads(build(), [workload])
    getattr(built, path)(0)
    return peak_memory_mib()


def peak_memory_mib() -> float:
    """Peak memory of this process so far, libraries and weights included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
