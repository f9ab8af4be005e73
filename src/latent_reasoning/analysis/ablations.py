"""Ablations: one setting of the recipe changed at a time, before and after RL.

The models are those of `report.ablations`: latent SFT models by what was changed, the recipe itself
first, each with the RL model that started from it, if there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import pandas
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from latent_reasoning.analysis.results import Results
from latent_reasoning.analysis.style import AFTER, BEFORE, nothing_to_show, page, per_cent
from latent_reasoning.evaluation.metrics import wilson_interval

STEPS_SHOWN = (0, 1, 2, 3, 4, 6, 8, 10)
"""The forced numbers of latent steps of the table, as far as they were measured."""


@dataclass(frozen=True)
class Ablation:
    """What was changed, and the models so trained; `rl` is None where RL was not run."""

    change: str
    sft: str
    rl: str | None


def ablations_of(results: Results) -> list[Ablation]:
    """The ablations of an experiment, in the configuration's order."""
    experiment = results.experiment
    found = []
    for change, model in experiment.report.ablations.items():
        rl = [n for n, e in experiment.models.items() if e.stage == "rl" and e.start == model]
        found.append(Ablation(change, model, rl[0] if rl else None))
    return found


def ablations_table(results: Results) -> pandas.DataFrame:
    """One row per ablation and phase (`latent SFT`, `RL`), on the first data set.

    Accuracy and tokens are means over seeds, with the interval of the pooled rows and the seeds'
    extremes; `forced_n` is the accuracy after n forced latent steps, pooled.
    """
    dataset, rows = results.datasets[0], []
    for ablation in ablations_of(results):
        for phase, model in (("latent SFT", ablation.sft), ("RL", ablation.rl)):
            if model is None:
                continue
            seeds = [results.summary(model, seed, dataset) for seed in results.seeds]
            accuracies = [summary["accuracy"] for summary in seeds]
            low, high = wilson_interval(
                sum(s["correct"] for s in seeds), sum(s["n"] for s in seeds)
            )
            forced = pandas.concat([results.forced(model, s, dataset) for s in results.seeds])
            curve = forced.groupby("latent_steps")[["correct", "n"]].sum()
            shares = curve["correct"] / curve["n"]
            rows.append(
                {
                    "change": ablation.change,
                    "phase": phase,
                    "model": model,
                    "seeds": len(seeds),
                    "n": seeds[0]["n"],
                    "accuracy": sum(accuracies) / len(seeds),
                    "accuracy_ci95_low": low,
                    "accuracy_ci95_high": high,
                    "accuracy_seed_min": min(accuracies),
                    "accuracy_seed_max": max(accuracies),
                    "reasoning_tokens": sum(s["reasoning_tokens_mean"] for s in seeds) / len(seeds),
                    "cut_off": sum(s["cut_off"] for s in seeds),
                    **{f"forced_{n}": shares[n] for n in STEPS_SHOWN if n in shares.index},
                }
            )
    return pandas.DataFrame(rows)


def ablations_figure(results: Results) -> Figure:
    """Accuracy and length of each ablation before and after RL, and its forced curves."""
    ablations, dataset = ablations_of(results), results.datasets[0]
    if not ablations:
        return nothing_to_show("This experiment has no ablations (report.ablations).")
    table = ablations_table(results).set_index("model")
    figure, grid = page(1, 3, 1.2 + 0.32 * len(ablations), sharey=True, width_ratios=(3, 2, 3))
    places = numpy.arange(len(ablations))[::-1]
    sides = (("sft", BEFORE, 0.12), ("rl", AFTER, -0.12))
    for place, ablation in zip(places, ablations, strict=True):
        for side, colour, offset in sides:
            model = getattr(ablation, side)
            if model is None:
                continue
            y = place + offset
            for axes, column in ((grid[0][0], "accuracy"), (grid[0][1], "reasoning_tokens_mean")):
                values = [results.summary(model, s, dataset)[column] for s in results.seeds]
                axes.plot(values, [y] * len(values), ".", color=colour, alpha=0.5, markersize=4)
            grid[0][0].plot(table.loc[model, "accuracy"], y, "o", color=colour)
            grid[0][1].plot(table.loc[model, "reasoning_tokens"], y, "o", color=colour)
        _forced_row(grid[0][2], results, ablation, place)
    grid[0][0].set_yticks(places, [ablation.change for ablation in ablations])
    grid[0][0].set_xlim(-0.03, 1.03)
    per_cent(grid[0][0].xaxis)
    titles = (f"accuracy on {dataset}", "reasoning tokens", "accuracy after n forced steps")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    grid[0][1].set_xlim(left=0)
    grid[0][2].set_xlabel("n (height: 0 to 100 %)")
    grid[0][2].xaxis.get_major_locator().set_params(integer=True)
    looks = (("latent SFT", BEFORE), ("and RL", AFTER))
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=text) for text, c in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _forced_row(axes, results: Results, ablation: Ablation, place: float) -> None:
    """The forced curves of one ablation, each between the lines of its neighbours."""
    for model, colour in ((ablation.sft, BEFORE), (ablation.rl, AFTER)):
        if model is None:
            continue
        parts = [results.forced(model, s, results.datasets[0]) for s in results.seeds]
        curve = pandas.concat(parts).groupby("latent_steps")["accuracy"].mean()
        axes.plot(curve.index, place - 0.4 + 0.8 * curve, color=colour, marker=".", markersize=4)
    for height in (-0.4, 0.4):
        axes.axhline(place + height, color="#cccccc", linewidth=0.5)
