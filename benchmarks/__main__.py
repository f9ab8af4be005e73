"""Time the package's own paths against the naive ones; one command, one thread, float32.

    python -m benchmarks [--shape h128|smollm2] [--workloads NAME ..] [--repetitions N]

prints a table and writes it as `results/benchmarks/summary.csv` (other shapes: `{shape}.csv`) with
the columns workload, metric, naive, fast and ratio: how many times better the fast path is, drawn
beside it (`.png`, `.svg`). The two paths run in turn, so that a machine that slows down slows both.
The batches are those of a folder of conformance vectors (LATENT_REASONING_CONFORMANCE, else
`../shared/conformance`), or generated ones of the same shapes.

    python -m benchmarks --model MODEL_DIR --rows FILE

does the same with a trained latent model on prepared rows (`results/{experiment}/data/test.jsonl`):
evaluation of all of them, RL on the first 32; `results/benchmarks/trained.csv`.

Beside seconds there are FLOPs, executed and over the minimum (`benchmarks/flops.py`), how many
answers of the two paths are equal, and the peak memory of latent SFT (trained: of a GRPO step).
`python -m benchmarks.scaling` shows how the cost grows.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from benchmarks.figures import draw_summary
from benchmarks.inputs import SHAPES, build_inputs, trained_inputs
from benchmarks.measure import (
    Build,
    Figure,
    as_csv,
    as_table,
    flop_figures,
    memory_figure,
    time_workload,
)
from benchmarks.workloads import WORKLOADS, build_workloads
from latent_reasoning.analysis.style import save
from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.dag.layout import results_root
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.runtime.device import set_threads
from latent_reasoning.runtime.files import write_text_atomically

TRAINED = "trained"
DEFAULT_WORKLOADS = {
    "h128": [name for name in WORKLOADS if name != "evaluation"],
    "smollm2": ["latent_sft", "cot_sft"],
    TRAINED: ["evaluation_adaptive", "evaluation", "grpo_rollout", "grpo_update", "grpo_step"],
}
"""On one thread the rest takes minutes a run at SmolLM2's shape: ask for it by name. A whole
evaluation is for trained models, whose answers end."""
MEMORY_WORKLOAD = {"h128": "latent_sft", "smollm2": "latent_sft", TRAINED: "grpo_step"}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of one shape or one trained model."""
    options = _parsed(arguments)
    set_threads(1)
    kind = options.shape if options.model is None else TRAINED
    build, source = _source(options)
    inputs = build()
    _say(f"{source}, {options.repetitions} repetitions of each path")
    names = options.workloads or DEFAULT_WORKLOADS[kind]
    figures: list[Figure] = []
    for workload in build_workloads(inputs, names):
        _say(f"{workload.name} ..")
        timed = time_workload(workload, options.repetitions)
        seconds = timed[0]
        counted = flop_figures(workload, options.repetitions + 1, seconds, options.peak_tflops)
        figures += timed + counted
    if MEMORY_WORKLOAD[kind] in names:
        figures.append(memory_figure(MEMORY_WORKLOAD[kind], build))
    name = "summary" if kind == "h128" else kind
    output = options.output or results_root() / "benchmarks" / f"{name}.csv"
    write_text_atomically(output, as_csv(figures))
    save(draw_summary(figures), output.parent, output.stem)
    print(as_table(figures))


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="h128", help="size of the model")
    add("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME")
    add("--repetitions", type=int, help="timed runs of each path (5; of a trained model 3)")
    add("--conformance", type=Path, help="folder of conformance vectors")
    add("--model", type=Path, metavar="MODEL_DIR", help="a trained latent model, with --rows")
    add("--rows", type=Path, metavar="FILE", help="prepared rows that the model is evaluated on")
    add("--batch-size", type=int, default=250, help="rows in a batch of the trained model")
    add("--max-new-tokens", type=int, default=96, help="longest answer of the trained model")
    add("--peak-tflops", type=float, help="what the hardware could do: adds share_of_peak")
    add("--output", type=Path, help="the CSV file to write")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.rows is None):
        parser.error("--model and --rows go together")
    if options.model is not None and {"latent_sft", "cot_sft"} & set(options.workloads or ()):
        parser.error("a trained model comes without SFT batches: leave latent_sft and cot_sft out")
    if options.repetitions is None:
        options.repetitions = 5 if options.model is None else 3
    for name in ("repetitions", "batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is below 1")
    return options


def _source(options: argparse.Namespace) -> tuple[Build, str]:
    """What makes the inputs, and what they are, in words."""
    if options.model is not None:
        build = partial(
            trained_inputs,
            options.model.resolve(),
            options.rows.resolve(),
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        )
        return build, f"{options.model} on {options.rows}"
    recorded = _recorded(options.conformance)
    source = "generated batches" if recorded is None else "recorded batches"
    build = partial(build_inputs, SHAPES[options.shape], recorded)
    return build, f"shape {options.shape}, {source}"


def _recorded(folder: Path | None) -> Path | None:
    """The folder `bench/` of the vectors, None where there are none."""
    default = PROJECT_ROOT.parent / "shared" / "conformance"
    bench = (folder or Path(os.environ.get("LATENT_REASONING_CONFORMANCE", default))) / "bench"
    return bench if bench.is_dir() else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_stage(main)
