"""Time the package's own paths against the naive ones; one command, one thread, float32.

    python -m benchmarks [--workloads NAME ..] [--repetitions N]

prints a table and writes it as `results/benchmarks/summary.csv` with the columns workload, metric,
naive, fast and ratio (how many times better the fast path is), with a figure beside it (`.png`,
`.svg`). The two paths alternate, so that a machine that slows down slows both. The model (hidden
size 128, 4 blocks) and its batches are generated.

    python -m benchmarks --model MODEL_DIR --rows FILE

does the same with a trained latent model on prepared rows (`results/{experiment}/data/test.jsonl`),
evaluation on all rows and RL on the first 32, and writes `results/benchmarks/trained.csv`.

    python -m benchmarks --device cuda --shape llama-1b

times training steps and decoding at a real model's size (`benchmarks/card.py`).

Beside seconds it measures the FLOPs executed, the number of equal answers of the two paths, and the
peak memory of latent SFT (trained: of a GRPO step). `python -m benchmarks.scaling` shows how the
cost grows.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.card import PATHS, SHAPES, measure_card
from benchmarks.inputs import Shape, build_inputs, trained_inputs
from benchmarks.measure import Measurement, count_flops, measure_memory, time_workload
from benchmarks.report import as_table, draw_summary, write
from benchmarks.workloads import WORKLOADS, build_workloads
from latent_reasoning.dag.layout import results_root
from latent_reasoning.runtime.command import positive, run_stage
from latent_reasoning.runtime.device import resolve_device

DEFAULT_WORKLOADS = {
    "summary": [name for name in WORKLOADS if name != "evaluation"],
    "trained": ["evaluation_adaptive", "evaluation", "grpo_rollout", "grpo_update", "grpo_step"],
}
"""By the table's name. A whole evaluation needs a trained model, whose answers end."""
MEMORY_WORKLOAD = {"summary": "latent_sft", "trained": "grpo_step"}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark of the generated or a trained model."""
    options = _parsed(arguments)
    if options.shape is not None:
        file = options.output or results_root() / "benchmarks" / "card.jsonl"
        device = resolve_device(options.device)
        paths = options.paths or PATHS[: 3 if device.type == "cuda" else 2]
        measure_card(options.shape, device, options.micro_batch, options.repetitions, file, paths)
        return
    torch.set_num_threads(1)
    table = "summary" if options.model is None else "trained"
    build = partial(build_inputs, Shape())
    if options.model is not None:
        sizes = {"batch_size": options.batch_size, "max_new_tokens": options.max_new_tokens}
        build = partial(trained_inputs, options.model.resolve(), options.rows.resolve(), **sizes)
    names = options.workloads or DEFAULT_WORKLOADS[table]
    measured: list[Measurement] = []
    for workload in build_workloads(build(), names):
        print(f"{workload.name} ..", file=sys.stderr, flush=True)
        timed = time_workload(workload, options.repetitions)
        measured += timed + count_flops(workload, options.repetitions + 1, seconds=timed[0])
    if MEMORY_WORKLOAD[table] in names:
        measured.append(measure_memory(MEMORY_WORKLOAD[table], build))
    output = options.output or results_root() / "benchmarks" / f"{table}.csv"
    write(measured, draw_summary(measured), output)
    print(as_table(measured).to_string(index=False, float_format="{:.5g}".format))


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME")
    add("--repetitions", type=positive, help="timed runs of each path (5; of a trained model 3)")
    add("--model", type=Path, metavar="MODEL_DIR", help="a trained latent model, with --rows")
    add("--rows", type=Path, metavar="FILE", help="prepared rows that the model is evaluated on")
    add("--batch-size", type=positive, default=250, help="rows in a batch of the trained model")
    add("--max-new-tokens", type=positive, default=96, help="longest answer of the trained model")
    add("--shape", choices=SHAPES, help="time the steps at a model's size on one device instead")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="with --shape")
    add("--paths", nargs="+", choices=PATHS, help="with --shape (all but compiled)")
    add("--micro-batch", type=positive, help="rows of a micro-batch, with --shape (all rows)")
    add("--output", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.rows is None):
        parser.error("--model and --rows go together")
    if options.model is not None and {"latent_sft", "cot_sft"} & set(options.workloads or ()):
        parser.error("a trained model comes without SFT batches: leave latent_sft and cot_sft out")
    if options.repetitions is None:
        options.repetitions = 5 if options.model is None else 3
    return options


if __name__ == "__main__":
    run_stage(main)
