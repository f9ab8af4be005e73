"""How the cost of training steps grows: seconds and memory of both paths, along one axis at a time.

    python -m benchmarks.scaling [--repetitions N] [--output FILE]

writes `results/benchmarks/scaling.csv` with the columns workload, axis, value, metric, naive, fast
and ratio, with a figure beside it (`.png`, `.svg`). It uses one thread, float32 and generated
batches; the two paths alternate, and the median time is reported. Memory is the peak of a process
of its own, its libraries included.

Where the axis does not change them, a model of 4 blocks and hidden size 128 reads 16 rows (RL: 4
prompts, 16 samples each) and takes 6 latent steps. Questions have 64 tokens in the mean, with the
relative lengths of GSM8K's. An answer in RL has 9 random tokens, so that no two samples are equal:
a trained model has far less to compute (`python -m benchmarks --model`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.inputs import Shape, build_inputs
from benchmarks.measure import Measurement, measure_memory, time_workload
from benchmarks.report import draw_scaling, write
from benchmarks.workloads import build_workloads
from latent_reasoning.dag.layout import results_root
from latent_reasoning.runtime.command import positive, run_stage

ANSWER_TOKENS = 9
HEAD_SIZE = 32


def _with_steps(shape: Shape, steps: int) -> Shape:
    """The shape with this number of latent steps in all rows and samples."""
    tokens = steps + 1 + ANSWER_TOKENS
    return replace(shape, steps=steps, sampled_steps=steps, rollout_tokens=tokens)


def _with_width(shape: Shape, width: int) -> Shape:
    """The shape with this hidden size, and the other widths in proportion."""
    heads, inner = width // HEAD_SIZE, width * 11 // 4
    attention = {"heads": heads, "key_value_heads": max(1, heads // 2)}
    return replace(shape, hidden_size=width, intermediate_size=inner, **attention)


def _with(name: str) -> Callable[[Shape, int], Shape]:
    return lambda shape, value: replace(shape, **{name: value})


@dataclass(frozen=True)
class Axis:
    """One quantity of the shape: its values, and the shape that has a value."""

    values: Sequence[int]
    of: Callable[[Shape, int], Shape]


BASE = _with_steps(Shape(rows=16, question=64), 6)
STEPS = Axis((0, 2, 4, 6, 8, 12), _with_steps)
QUESTION = Axis((32, 64, 128, 256), _with("question"))
WIDTH = Axis((64, 128, 256), _with_width)
AXES = {
    "latent_sft": {
        "latent_steps": STEPS,
        "batch": Axis((4, 8, 16, 32, 64), _with("rows")),
        "question_tokens": QUESTION,
        "hidden_size": WIDTH,
    },
    "grpo_step": {
        "latent_steps": STEPS,
        "group_size": Axis((2, 4, 16, 64), _with("group_size")),
        "question_tokens": QUESTION,
        "hidden_size": WIDTH,
    },
}


def main(arguments: list[str] | None = None) -> None:
    """Measure all points, write and draw them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repetitions", type=positive, default=3, help="timed runs of each path")
    parser.add_argument("--output", type=Path, help="the CSV file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    points = list(measure(BASE, options.repetitions))
    output = options.output or results_root() / "benchmarks" / "scaling.csv"
    write(points, draw_scaling(points), output)


def measure(base: Shape, repetitions: int) -> Iterator[Measurement]:
    """Seconds and memory at every point of every axis through `base`, each shape measured once."""
    for workload, axes in AXES.items():
        done: dict[Shape, list[Measurement]] = {}
        for name, axis in axes.items():
            for value in axis.values:
                shape = axis.of(base, value)
                if shape not in done:
                    print(f"{workload}, {name} {value} ..", file=sys.stderr, flush=True)
                    build = partial(build_inputs, shape)
                    memory = measure_memory(workload, build)
                    (built,) = build_workloads(build(), [workload])
                    done[shape] = [time_workload(built, repetitions)[0], memory]
                yield from (replace(one, axis=name, value=value) for one in done[shape])


if __name__ == "__main__":
    run_stage(main)
