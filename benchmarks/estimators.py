r"""The sampled and the exact estimator of RL, compared on the models of an experiment.

    snakemake --cores all --configfile config/laptop.yaml config/laptop-sre.yaml \
        config/laptop-estimators.yaml
    python -m benchmarks.estimators [--config FILE ..] [--repeats N]

writes to `results/benchmarks/estimators/`:

- `variance.csv`: for one batch of questions, sampled `repeats` times with different random numbers,
  the squared norm of the mean gradient and the variance around it (summed over weights), before and
  after RL, with the CPU seconds of a step;
- `curves.csv` and `curves.{png,svg}`: validation accuracy and length against optimiser steps and
  CPU seconds (Snakemake's measurement of the whole job, spread evenly over its steps);
- `summary.csv`: the end of each curve, when it came near the shortest end, and any test results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import matplotlib
import pandas
import torch
from matplotlib.figure import Figure
from torch import Tensor

from latent_reasoning.analysis.style import PALETTE, STYLE, page, save
from latent_reasoning.config import Experiment, UserError, load
from latent_reasoning.dag.layout import Layout, main_models, results_root
from latent_reasoning.rl.build import build
from latent_reasoning.rl.task import AdaptiveLengthTask
from latent_reasoning.runtime.command import described, positive, run_stage
from latent_reasoning.runtime.device import join_machine
from latent_reasoning.runtime.files import write_text_atomically
from latent_reasoning.training.gradients import accumulate_gradients
from latent_reasoning.training.run import TrainingRun

NEAR = 0.1
"""Tokens: a length is near the shortest final length of all curves within this distance."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the tables and the figure."""
    parser = described(__doc__)
    default = [f"config/laptop{name}.yaml" for name in ("", "-sre", "-estimators")]
    parser.add_argument("--config", nargs="+", default=default, help="the experiment's files")
    parser.add_argument("--repeats", type=positive, default=40, help="gradients of each estimator")
    options = parser.parse_args(arguments)
    experiment = load(options.config)
    folder = results_root() / "benchmarks" / "estimators"
    found = list(read_curves(experiment))
    if not found:
        raise UserError(
            f"{experiment.experiment} has no finished RL model under {results_root()}: run its "
            "workflow first (python -m benchmarks.estimators --help)"
        )
    curves = pandas.concat(found, ignore_index=True)
    variance = pandas.DataFrame(measure_variance(experiment, options.repeats))
    tables = {"curves": curves, "summary": summarise(experiment, curves), "variance": variance}
    for name, table in tables.items():
        text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        write_text_atomically(folder / f"{name}.csv", text)
        print(name, table.to_string(index=False), sep="\n")
    with matplotlib.rc_context(STYLE):
        save(draw(curves), folder, "curves")


def measure_variance(experiment: Experiment, repeats: int) -> Iterator[dict[str, object]]:
    """A row per estimator, before and after RL, for the experiment's first seed."""
    seed, layout = experiment.seeds[0], Layout.of(experiment)
    names = reversed(main_models(experiment))
    by_estimator = {getattr(experiment.models[name], "estimator", None): name for name in names}
    sampled, exact = by_estimator["sampled"], by_estimator["exact"]
    machine = join_machine(experiment.runtime)
    for weights in (experiment.models[sampled].start, sampled):
        for model in (sampled, exact):
            entry = experiment.models[model].model_copy(update={"kl_weight": 0.0})
            run = TrainingRun(experiment, model, seed, "variance", machine)
            run.entry, run.parents = entry, {entry.start: layout.model(weights, seed)}
            run.seed_weights()
            *_, task = build(run)
            gradients, seconds = repeated_gradients(task, repeats)
            mean, variance = gradients.mean(0), gradients.var(0).sum().item()
            yield {
                "weights": weights,
                "estimator": entry.estimator,
                "repeats": repeats,
                "mean_norm2": (mean @ mean).item() - variance / repeats,
                "variance": variance,
                "cpu_seconds": seconds,
            }


def repeated_gradients(task: AdaptiveLengthTask, repeats: int) -> tuple[Tensor, float]:
    """Gradients (repeats, weights) on the questions of the first step, and CPU seconds of each."""
    questions = task.plan.micro_batches(0)
    task.plan.micro_batches = lambda _step: questions
    task.model.train()
    gradients = []
    started = time.process_time()
    for step in range(repeats):
        task.model.zero_grad()
        accumulate_gradients(task.model, task, step)
        parts = [w.grad.flatten().double() for w in task.model.parameters() if w.grad is not None]
        gradients.append(torch.cat(parts))
    return torch.stack(gradients), (time.process_time() - started) / repeats


def read_curves(experiment: Experiment) -> Iterator[pandas.DataFrame]:
    """`model, seed, step, cpu_seconds, accuracy, reasoning_tokens` of each available RL run."""
    layout = Layout.of(experiment)
    for model, entry in experiment.models.items():
        for seed in experiment.seeds:
            path = layout.model(model, seed) / "training.csv"
            times = layout.benchmarks / "rl" / model / f"seed-{seed}.tsv"
            if entry.stage != "rl" or not (path.exists() and times.exists()):
                continue
            table = pandas.read_csv(path).dropna(subset="validation_accuracy")
            seconds = pandas.read_csv(times, sep="\t", na_values="-")["cpu_time"].iloc[-1]
            columns = {
                "model": model,
                "seed": seed,
                "step": table["step"],
                "cpu_seconds": seconds * table["step"] / entry.training.steps,
                "accuracy": table["validation_accuracy"],
                "reasoning_tokens": table["validation_reasoning_tokens"],
            }
            yield pandas.DataFrame(columns)


def summarise(experiment: Experiment, curves: pandas.DataFrame) -> pandas.DataFrame:
    """The last values of each run, and when its length first came near the shortest final one."""
    run = ["model", "seed"]
    ends = curves.groupby(run, sort=False).last()
    goal = ends["reasoning_tokens"].min() + NEAR
    near = curves[curves["reasoning_tokens"] <= goal].groupby(run)[["step", "cpu_seconds"]].first()
    table = ends[["step", "cpu_seconds"]].join(near, rsuffix="_to_near")
    table[["validation_accuracy", "validation_tokens"]] = ends[["accuracy", "reasoning_tokens"]]
    table[["test_accuracy", "test_tokens"]] = float("nan")
    for model, seed in table.index:
        file = Layout.of(experiment).evaluation(model, seed, "test") / "summary.json"
        if file.exists():
            test = json.loads(file.read_text(encoding="utf-8"))
            measured = [test["accuracy"], test["reasoning_tokens_mean"]]
            table.loc[(model, seed), ["test_accuracy", "test_tokens"]] = measured
    return table.rename(columns=lambda name: name.replace("step", "steps")).reset_index()


def draw(curves: pandas.DataFrame) -> Figure:
    """Length in the upper row, accuracy in the lower; against steps (left) and seconds (right)."""
    figure, grid = page(2, 2, 5.0, sharex="col", sharey="row")
    colours = dict(zip(curves["model"].unique(), PALETTE, strict=False))
    quantities = {"reasoning_tokens": "reasoning tokens", "accuracy": "accuracy"}
    for row, (column, label) in zip(grid, quantities.items(), strict=True):
        for axes, against in zip(row, ("step", "cpu_seconds"), strict=True):
            for (model, _), curve in curves.groupby(["model", "seed"], sort=False):
                look = {"color": colours[model], "linewidth": 1.1, "label": model}
                axes.plot(curve[against], curve[column], **look)
        row[0].set_ylabel(f"validation: {label}")
    grid[1, 0].set_xlabel("optimiser step")
    grid[1, 1].set_xlabel("CPU seconds")
    lines = {line.get_label(): line for line in grid[0, 0].lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
    return figure


if __name__ == "__main__":
    run_stage(main)
