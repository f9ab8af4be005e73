"""Time the package's own paths against the naive ones; one command, one thread, float32.

    python -m benchmarks [--shape h128|smollm2] [--workloads NAME ..] [--repetitions N]

prints a table and writes it as `results/benchmarks/summary.csv` (other shapes: `{shape}.csv`) with
the columns workload, metric, naive, fast and ratio: how many times better the fast path is. The two
paths run in turn, so that a machine that slows down slows both. The batches are those of a folder
of conformance vectors (LATENT_REASONING_CONFORMANCE, else `../shared/conformance`), or generated
ones of the same shapes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.inputs import SHAPES, build_inputs
from benchmarks.measure import (
    PATHS,
    Figure,
    as_csv,
    as_table,
    memory_figure,
    peak_memory_mib,
    time_workload,
)
from benchmarks.workloads import WORKLOADS, build_workloads
from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.device import set_threads
from latent_reasoning.files import write_text_atomically
from latent_reasoning.paths import results_root

DEFAULT_WORKLOADS = {"h128": list(WORKLOADS), "smollm2": ["latent_sft", "cot_sft"]}
"""On one thread the rest takes minutes a run at SmolLM2's shape: ask for it by name."""
MEMORY_WORKLOAD = "latent_sft"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of one shape, or one path alone for its peak memory."""
    options = _parser().parse_args(arguments)
    set_threads(1)
    recorded = _recorded(options.conformance)
    inputs = build_inputs(SHAPES[options.shape], recorded)
    if options.memory_of:
        name, path = options.memory_of
        (workload,) = build_workloads(inputs, [name])
        getattr(workload, path)(0)
        print(peak_memory_mib())
        return
    source = "generated batches" if recorded is None else "recorded batches"
    _say(f"shape {options.shape}, {source}, {options.repetitions} repetitions of each path")
    names = options.workloads or DEFAULT_WORKLOADS[options.shape]
    figures: list[Figure] = []
    for workload in build_workloads(inputs, names):
        _say(f"{workload.name} ..")
        figures += time_workload(workload, options.repetitions)
    if MEMORY_WORKLOAD in names:
        same = ["--shape", options.shape]
        if options.conformance is not None:
            same += ["--conformance", str(options.conformance.resolve())]
        figures.append(memory_figure(MEMORY_WORKLOAD, same))
    name = "summary" if options.shape == "h128" else options.shape
    output = options.output or results_root() / "benchmarks" / f"{name}.csv"
    write_text_atomically(output, as_csv(figures))
    print(as_table(figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="h128", help="size of the model")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME")
    parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each path")
    parser.add_argument("--conformance", type=Path, help="folder of conformance vectors")
    parser.add_argument("--output", type=Path, help="the CSV file to write")
    parser.add_argument(
        "--memory-of",
        nargs=2,
        metavar=("NAME", "|".join(PATHS)),
        help="run one path of a workload once, and print the peak memory in MiB",
    )
    return parser


def _recorded(folder: Path | None) -> Path | None:
    """The folder `bench/` of the vectors, None where there are none."""
    default = PROJECT_ROOT.parent / "shared" / "conformance"
    bench = (folder or Path(os.environ.get("LATENT_REASONING_CONFORMANCE", default))) / "bench"
    return bench if bench.is_dir() else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
