"""The figures, each as .png and .svg, drawn from an experiment's result files alone.

With several seeds, the mean is prominent and each seed is a thin line or a small point. The look of
each model comes from `analysis.style`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from latent_reasoning.analysis.compute import compute_figure
from latent_reasoning.analysis.results import Results
from latent_reasoning.analysis.style import (
    AFTER,
    BEFORE,
    STYLE,
    Look,
    legend_below,
    looks,
    nothing_to_show,
    page,
    per_cent,
    save,
    share_axis,
)
from latent_reasoning.analysis.tables import forced_table, main_table


def write_figures(results: Results, folder: Path) -> None:
    """Draw every figure as `folder/{name}.png` and `.svg`."""
    for name in FIGURES:
        save(draw(name, results), folder, name)


def draw(name: str, results: Results) -> Figure:
    """One figure, in the common style."""
    with matplotlib.rc_context(STYLE):
        return FIGURES[name](results)


# ------------------------------------------------------------------------ accuracy and length


def accuracy_vs_tokens(results: Results) -> Figure:
    """Accuracy against mean reasoning tokens, with intervals; arrows point from SFT to RL.

    Each data set has a row: all models, and the latent models alone, enlarged.
    """
    table = main_table(results)
    latent = [m for m in results.models if results.stage(m) in ("latent_sft", "rl")]
    views = [results.models, latent] if latent else [results.models]
    figure, grid = page(len(results.datasets), len(views), 0.6 + 2.9 * len(results.datasets))
    for axes_row, dataset in zip(grid, results.datasets, strict=True):
        rows = table[table["dataset"] == dataset].set_index("model")
        for axes, models in zip(axes_row, views, strict=True):
            _accuracy_and_tokens(axes, results, dataset, rows.loc[models])
            axes.set_xlabel("mean reasoning tokens")
            axes.set_title(dataset if models is results.models else f"{dataset}: latent models")
        axes_row[0].set_ylabel("accuracy")
        axes_row[0].set_xlim(left=-0.04 * max(1.0, rows["reasoning_tokens"].max()))
        share_axis(axes_row[0])
        per_cent(axes_row[-1].yaxis)
    legend_below(figure, grid[0][0], columns=3)
    return figure


def _accuracy_and_tokens(
    axes: Axes, results: Results, dataset: str, rows: pandas.DataFrame
) -> None:
    """The points of some models; `rows` are their rows of the main table, indexed by model."""
    look = looks(results)
    for model, row in rows.iterrows():
        low, high = row["accuracy_ci95_low"], row["accuracy_ci95_high"]
        axes.errorbar(
            row["reasoning_tokens"],
            row["accuracy"],
            yerr=[[row["accuracy"] - low], [high - row["accuracy"]]],
            ecolor=look[model].colour,
            capsize=3,
            linestyle="none",
            label=model,
            **look[model].point,
        )
        _seed_points(axes, results, model, dataset, look[model])
    for pair in results.rl_pairs():
        if {pair.model, pair.reference} <= set(rows.index):
            _arrow(axes, rows.loc[pair.reference], rows.loc[pair.model], look[pair.model].colour)


def _seed_points(axes: Axes, results: Results, model: str, dataset: str, look: Look) -> None:
    """A small point for each seed, where there are several."""
    if len(results.seeds) < 2:
        return
    for seed in results.seeds:
        summary = results.summary(model, seed, dataset)
        axes.plot(
            summary["reasoning_tokens_mean"],
            summary["accuracy"],
            marker=".",
            markersize=4,
            color=look.colour,
            alpha=0.5,
        )


def _arrow(axes: Axes, start: pandas.Series, end: pandas.Series, colour: str) -> None:
    where = ["reasoning_tokens", "accuracy"]
    axes.annotate(
        "",
        xy=tuple(end[where]),
        xytext=tuple(start[where]),
        arrowprops={
            "arrowstyle": "->",
            "color": colour,
            "alpha": 0.7,
            "shrinkA": 6,
            "shrinkB": 6,
            "connectionstyle": "arc3,rad=0.15",
        },
    )


def length_distribution(results: Results) -> Figure:
    """Share of answers at each length before and after RL; right and wrong answers are separate."""
    pairs = results.rl_pairs()
    if not pairs:
        return nothing_to_show("No model of this experiment was trained by RL.")
    dataset = results.datasets[0]
    figure, grid = page(2, len(pairs), 4.4, sharex="col")
    for column, pair in enumerate(pairs):
        before = results.pooled_predictions(pair.reference, dataset)
        after = results.pooled_predictions(pair.model, dataset)
        for axes, right in zip(grid[:, column], (True, False), strict=True):
            for frame, colour, offset in ((before, BEFORE, -0.2), (after, AFTER, 0.2)):
                chosen = frame.loc[frame["correct"] == right, "reasoning_tokens"]
                shares = chosen.value_counts(normalize=True)
                axes.bar(shares.index + offset, shares, width=0.4, color=colour)
            counts = [int((frame["correct"] == right).sum()) for frame in (before, after)]
            kind = "right" if right else "wrong"
            axes.set_title(f"{pair.model}: {counts[0]:,} {kind} before, {counts[1]:,} after")
            axes.set_ylim(0, 1.05)
            per_cent(axes.yaxis)
        _length_axis(grid[0][column], pandas.concat([before, after])["reasoning_tokens"])
        grid[1][column].set_xlabel("reasoning tokens")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of these answers")
    sides = [Patch(color=BEFORE, label="before RL"), Patch(color=AFTER, label="after RL")]
    figure.legend(handles=sides, loc="outside lower center", ncols=2)
    return figure


def _length_axis(axes: Axes, lengths: pandas.Series) -> None:
    """Show all lengths that occur, with ticks at whole numbers only."""
    middle, half = (lengths.min() + lengths.max()) / 2, (lengths.max() - lengths.min()) / 2
    axes.set_xlim(middle - max(2.5, half + 0.7), middle + max(2.5, half + 0.7))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def length_by_steps(results: Results) -> Figure:
    """Mean length by number of gold steps, before and after RL."""
    pairs, dataset = results.rl_pairs(), results.datasets[0]
    if not pairs:
        return nothing_to_show("No model of this experiment was trained by RL.")
    frames = {
        model: results.pooled_predictions(model, dataset)
        for pair in pairs
        for model in (pair.reference, pair.model)
    }
    if all(frame["gold_steps"].isna().all() for frame in frames.values()):
        return nothing_to_show(f"The rows of {dataset} have no reasoning steps to count.")
    figure, grid = page(1, len(pairs), 3.0, sharey=True)
    for axes, pair in zip(grid[0], pairs, strict=True):
        sides = ((pair.reference, "before RL", BEFORE, "-"), (pair.model, "after RL", AFTER, "--"))
        for model, when, colour, style in sides:
            lengths = frames[model].groupby(["gold_steps", "seed"])["reasoning_tokens"].mean()
            _mean_and_seeds(axes, lengths.unstack("seed"), colour, style, label=when)
        axes.set_title(f"{pair.reference} and {pair.model}")
        axes.set_xlabel("reasoning steps of the solution")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # The axes share their y axis, whose limit is known only when all lines are drawn.
    grid[0][0].set_ylim(bottom=0)
    grid[0][0].set_ylabel("mean reasoning tokens")
    legend_below(figure, grid[0][0])
    return figure


def _mean_and_seeds(
    axes: Axes, table: pandas.DataFrame, colour: str, style: str, label: str
) -> None:
    """A line for the mean over the columns (seeds), and a thin line for each of several."""
    x = table.index.to_numpy(dtype=float)
    if table.shape[1] > 1:
        for seed in table.columns:
            y = table[seed].to_numpy(dtype=float)
            axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.6)
    mean = table.mean(axis="columns").to_numpy(dtype=float)
    axes.plot(x, mean, color=colour, linestyle=style, marker="o", markersize=4, label=label)


def accuracy_forced(results: Results) -> Figure:
    """Accuracy after n forced latent steps; a dotted line shows a model that answers at once."""
    dataset = results.datasets[0]
    table = forced_table(results)
    table = table[table["dataset"] == dataset]
    counts = table.groupby("model")["latent_steps"].nunique()
    latent = [model for model in results.models if counts[model] > 1]
    if not latent:
        return nothing_to_show("No model of this experiment takes latent steps.")
    look = looks(results)
    figure, grid = page(1, 1, 3.4)
    axes = grid[0][0]
    for model in latent:
        rows = table[table["model"] == model]
        x = rows["latent_steps"]
        band = (rows["accuracy_ci95_low"], rows["accuracy_ci95_high"])
        axes.fill_between(x, *band, color=look[model].colour, alpha=0.12, linewidth=0)
        axes.plot(x, rows["accuracy"], label=model, **look[model].line, **look[model].point)
        if len(results.seeds) > 1:
            for seed in results.seeds:
                one = results.forced(model, seed, dataset)
                thin = {"linewidth": 0.6, "alpha": 0.6}
                axes.plot(one["latent_steps"], one["accuracy"], **look[model].line, **thin)
    for model in results.no_reasoning_models():
        accuracy = results.pooled_predictions(model, dataset)["correct"].mean()
        axes.axhline(accuracy, color="#555555", linestyle=":", label=f"{model} (no steps)")
    axes.set_xlabel("forced number of latent steps n (length n + 2)")
    axes.set_ylabel(f"accuracy on {dataset}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    share_axis(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


# ---------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Panel:
    """A panel of the training curves: its columns, and the stages that have them."""

    title: str
    stages: tuple[str, ...]
    columns: tuple[str, ...]
    scale: Literal["linear", "log", "share"] = "linear"


PANELS = (
    Panel("SFT: loss", ("sft", "latent_sft"), ("loss",), "log"),
    Panel(
        "latent SFT: parts of the loss",
        ("latent_sft",),
        ("teacher_loss", "student_loss", "codi_loss", "meaned_loss"),
        "log",
    ),
    Panel("validation accuracy", ("sft", "latent_sft", "rl"), ("validation_accuracy",), "share"),
    Panel("RL: mean length of rollouts", ("rl",), ("reasoning_tokens",)),
    Panel("RL: KL to the start model", ("rl",), ("kl",)),
    Panel("RL: share of all-correct groups", ("rl",), ("all_correct_share",), "share"),
)
FEW = 3
"""A line through at most this number of values gets points too, to be visible."""
PART_STYLES = ("-", "--", ":", "-.")


def training_curves(results: Results) -> Figure:
    """Loss and its parts, validation accuracy, and RL's length, KL and all-correct groups."""
    look = looks(results)
    figure, grid = page(2, 3, 5.0)
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        for model, curves in _curves(results, panel.stages):
            for column, style in zip(panel.columns, PART_STYLES, strict=False):
                _curve(axes, curves, column, look[model], style if len(panel.columns) > 1 else None)
        _dress(axes, panel)
    trained = [model for model in results.models if results.stage(model) != "import"]
    handles = [Line2D([], [], label=model, **look[model].line) for model in trained]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, max(1, len(handles))))
    return figure


def _curves(results: Results, stages: tuple[str, ...]) -> Iterator[tuple[str, pandas.DataFrame]]:
    """The training curves of the models of some stages, one for each seed."""
    for model in results.models:
        if results.stage(model) in stages:
            for seed in results.seeds:
                yield model, results.training(model, seed)


def _curve(
    axes: Axes, curves: pandas.DataFrame, column: str, look: Look, part_style: str | None
) -> None:
    """One column of one training, where it was measured; few values also get points."""
    if column not in curves or curves[column].isna().all():
        return
    known = curves.dropna(subset=column)
    line = look.line | ({"linestyle": part_style} if part_style else {})
    if len(known) <= FEW:
        line |= {"marker": ".", "markersize": 5}
    axes.plot(known["step"], known[column], linewidth=1.1, label=column, **line)


def _dress(axes: Axes, panel: Panel) -> None:
    """Set title and scale, and for several columns a legend of the line styles."""
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if not axes.lines:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color="#555555")
        return
    if panel.scale == "log":
        axes.set_yscale("log")
    if panel.scale == "share":
        share_axis(axes)
    drawn = {line.get_label() for line in axes.lines}
    if len(panel.columns) > 1:
        handles = [
            Line2D([], [], color="#555555", linestyle=style, label=column.replace("_", " "))
            for column, style in zip(panel.columns, PART_STYLES, strict=False)
            if column in drawn
        ]
        axes.legend(handles=handles, loc="upper right", fontsize=7.5)


FIGURES: dict[str, Callable[[Results], Figure]] = {
    "accuracy_vs_tokens": accuracy_vs_tokens,
    "length_distribution": length_distribution,
    "length_by_steps": length_by_steps,
    "accuracy_forced": accuracy_forced,
    "accuracy_vs_compute": compute_figure,
    "training_curves": training_curves,
}
"""Every figure by its file name; `workflow/report/{name}.rst` is its caption."""
