"""The figures of a study, drawn from its tables alone; those of the latent steps are here.

Heat maps carry their numbers, lines differ in colour and marker, and equal tables give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.figure import Figure

from latent_reasoning.analysis.style import (
    MARKERS,
    PALETTE,
    STYLE,
    legend_below,
    nothing_to_show,
    page,
    save,
    share_axis,
)
from latent_reasoning.inside.drawing import Tables, heat_map, intervals, look, whole_numbers
from latent_reasoning.inside.space_figures import SPACE_FIGURES, kinds


def lens(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """A: how often v_m is read at step j, in per cent."""
    table = tables["lens"].query("role == 'all'")
    if table.empty:
        return nothing_to_show("no row states equations that hold")
    shown = [a for a in ("right", "wrong") if table.loc[table["answers"] == a, "n"].max() >= 10]
    if not shown:
        return nothing_to_show("fewer than ten right answers, and fewer than ten wrong ones")
    readings = {"top1": "likeliest word", "top5": "among five", "control_top1": "other row's"}
    figure, grid = page(len(shown), 3, 0.8 + 1.9 * len(shown))
    for axes, (answers, reading) in zip(grid.flat, product(shown, readings), strict=True):
        cells = table[(table["answers"] == answers) & (table["reading"] == reading)]
        matrix = cells.pivot(index="value", columns="step", values="accuracy")
        title = f"{readings[reading]}; {answers}, n up to {cells['n'].max()}"
        heat_map(axes, matrix, title, "latent h_j, j", "value v_m, m")
    return figure


def errors(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """A: the first value that is read wrong, in rows whose answer is right or wrong."""
    table = tables["errors"].query("operations > 0")
    if table.empty:
        return nothing_to_show("no row has an intermediate value that its latents could hold")
    figure, grid = page(1, 2, 2.7)
    for axes, answers in zip(grid[0], ("right", "wrong"), strict=True):
        cells = table[table["answers"] == answers]
        matrix = cells.pivot(index="operations", columns="entered", values="accuracy")
        count = cells.drop_duplicates("operations")["n"].sum()
        title = f"{answers} answers (n = {count}), per cent of each K"
        heat_map(axes, matrix, title, "first value read wrong, m (K: none)", "operations K")
    return figure


def interventions(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """B: accuracy where the input of a step is replaced."""
    table = tables["interventions"]
    if table.empty:
        return nothing_to_show("no row takes a latent step")
    figure, grid = page(1, 1, 3.4)
    axes, by_kind = grid[0][0], table.groupby("kind")
    for index, (kind, rows) in enumerate(by_kind):
        rows = rows.assign(place=rows["step"] + 0.09 * (index - (len(by_kind) - 1) / 2))
        intervals(axes, rows, "place", "accuracy", "accuracy", index, kind)
    every = by_kind.get_group("zero")  # all rows that take the step
    axes.plot(every["step"], every["untouched"], color="#555555", linestyle=":", label="untouched")
    axes.set_xticks(every["step"], ["all" if step == 0 else str(step) for step in every["step"]])
    axes.set(xlabel="latent step whose input z_j is replaced", ylabel="accuracy")
    share_axis(axes)
    legend_below(figure, axes, columns=6)
    return figure


def counterfactual(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """B: how often a donor's latent gives exactly the answer that its value implies."""
    table = tables["counterfactual"]
    if table.empty:
        return nothing_to_show("no row's equations form a chain that a donor could change")
    figure, grid = page(1, 3, 2.7)
    cells = table[table["role"] == "all"]
    titles = {
        "accuracy": "the implied answer",
        "chance": "expected by chance",
        "kept": "still the right answer",
    }
    for axes, (values, title) in zip(grid[0], titles.items(), strict=True):
        matrix = cells.pivot(index="value", columns="step", values=values)
        matrix = matrix.rename(columns={0: "all"})
        heat_map(axes, matrix, title, "donor's input at step j", "donor's value v_m, m")
    return figure


def need(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """C: accuracy at every number of steps, and steps needed against steps taken."""
    figure, ((curves, bars),) = page(1, 2, 3.1)
    for index, (k, rows) in enumerate(tables["forced"].groupby("operations")):
        style = {"label": f"K = {k}", "color": PALETTE[(index - 1) % 6], "lw": 1.2}
        if k == 0:
            style = {"label": "all rows", "color": "black", "lw": 2.4}
        curves.plot(rows["steps"], rows["accuracy"], marker=MARKERS[index % 8], **style)
    curves.set(xlabel="latent steps, forced", ylabel="accuracy")
    share_axis(curves)
    curves.legend(fontsize=7)
    known = tables["need"].dropna(subset="needed").astype({"needed": int})
    for offset, column, colour in ((-0.2, "needed", PALETTE[0]), (0.2, "stops", PALETTE[1])):
        counts = known[column].value_counts()
        label = f"{column}, mean {known[column].mean():.2f}"
        bars.bar(counts.index + offset, counts, 0.4, color=colour, label=label)
    last = known["stops"].max() if len(known) else 0
    bars.set(xlabel="latent steps", ylabel="rows", xticks=range(last + 1))
    bars.set_title(f"needed, and taken before stopping (n = {len(known)})")
    bars.legend(fontsize=7)
    return figure


def probes(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """D: what ridge probes read, at the final norm and by block."""
    table, blocks = tables["probes"], summary["blocks"]
    if table.empty:
        return nothing_to_show("too few rows to train probes on")
    figure, ((map_axes, axes),) = page(1, 2, 3.0)
    latent = table[table["source"] == "latent"]
    last = latent[latent["block"] == blocks]
    matrix = last.pivot(index="value", columns="step", values="accuracy")
    heat_map(map_axes, matrix, "final state", "latent h_j, j", "value v_m, m")
    diagonal = latent[latent["step"] == latent["value"] - 1]
    for index, (m, rows) in enumerate(diagonal.groupby("value")):
        axes.plot(rows["block"], rows["accuracy"], label=f"v_{m} from h_{m - 1}", **look(index))
    for source, line in (("question", ":"), ("shuffled", "--")):
        rows = table[table["source"] == source].groupby("block")["accuracy"].mean()
        axes.plot(rows.index, rows, color="#777777", linestyle=line, label=f"control: {source}")
    names = ["embedding", *map(str, range(blocks)), "final"]
    shown = range(0, len(names), max(1, len(names) // 8))
    axes.set_xticks([i - 1 for i in shown], [names[i] for i in shown])
    axes.set(xlabel="after block", ylabel="accuracy on other rows")
    share_axis(axes)
    axes.legend(fontsize=7)
    return figure


def latents(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """E: the latents in their own PCA, by step, by the value reached, by right or wrong."""
    table = tables["latents"]
    values = sorted(table["value"].dropna().unique(), key=lambda v: (len(v), v))
    colourings = {"by step": ("step", {j: j for j in sorted(table["step"].unique())})}
    if len(values) <= 12:
        colourings["by the value reached"] = ("value", {v: v for v in values})
    colourings["by right or wrong"] = ("correct", {True: "right", False: "wrong"})
    figure, grid = page(1, len(colourings), 3.0, sharex=True, sharey=True)
    for axes, (title, (column, options)) in zip(grid[0], colourings.items(), strict=True):
        colours = matplotlib.colormaps["viridis"](numpy.linspace(0, 0.95, len(options)))
        for colour, (option, name) in zip(colours, options.items(), strict=True):
            rows = table[table[column] == option]
            style = {"s": 5, "color": colour, "rasterized": True}
            axes.scatter(rows["c1"], rows["c2"], label=f"{name}", **style)
        axes.set(title=title, xlabel="PC 1", ylabel="PC 2")
        axes.legend(fontsize=6, markerscale=2, handletextpad=0.1)
    figure.suptitle(f"h_0 .. h_n; shares of the variance {table['explained'].iloc[0]}", fontsize=9)
    return figure


def distances(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """E: norms of the latents' inputs, distance to the nearest token, and from step to step."""
    table = tables["distances"]
    if table.empty:
        return nothing_to_show("no row takes a latent step")
    figure, grid = page(1, 3, 2.5)
    titles = {
        "norm": "norm of z_j (dashed: of tokens)",
        "nearest": "distance to the nearest token",
        "change": "distance from the input before",
    }
    steps = sorted(table["step"].unique())
    for axes, (column, title) in zip(grid[0], titles.items(), strict=True):
        values = [table.loc[table["step"] == j, column].dropna() for j in steps]
        axes.boxplot(values, positions=steps, widths=0.6, sym="", medianprops={"color": PALETTE[1]})
        axes.set(title=title, xlabel="latent step j", ylim=(0, None))
    grid[0][0].axhline(table["token_norm"].iloc[0], color=PALETTE[0], linestyle="--")
    grid[0][0].set_ylim(0, 1.15 * table["norm"].max())
    return figure


def attention(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """G: where latents and answer tokens look, by block."""
    table = tables["attention"].query("head == -1 and operations == 0")
    if table.empty:
        return nothing_to_show("no positions to look from")
    figure, grid = page(1, 2, 2.9, sharey=True)
    hatches = {"question": "", "start": "//", "latent": "..", "answer": "xx"}
    for axes, source in zip(grid[0], ("latent", "answer"), strict=True):
        bottom = numpy.zeros(summary["blocks"])
        for colour, (target, hatch) in zip(PALETTE, hatches.items(), strict=False):
            rows = table[(table["source"] == source) & (table["target"] == target)]
            mean = rows.set_index("block")["mean"].reindex(range(summary["blocks"]), fill_value=0)
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": target}
            axes.bar(mean.index, mean, bottom=bottom, **style)
            bottom += mean.to_numpy()
        axes.set(title=f"from {source} positions", xlabel="block", ylabel="attention to")
        whole_numbers(axes.xaxis)
    share_axis(grid[0][0])
    legend_below(figure, grid[0][0], columns=4)
    return figure


def signals(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """H: how well signals of the trajectory tell right from wrong answers."""
    table = tables["signal_areas"].dropna(subset="auc")
    if table.empty:
        return nothing_to_show("all answers are right, or all wrong: nothing to tell apart")
    names = list(dict.fromkeys(table["signal"]))
    figure, grid = page(1, 1, 0.9 + 0.34 * len(names))
    axes = grid[0][0]
    for index, (k, rows) in enumerate(table.groupby("operations")):
        rows = rows.assign(place=rows["signal"].map(names.index) + 0.13 * (index - 1.5))
        label = ("all rows" if k == 0 else f"K = {k}") + f" ({rows['wrong'].iloc[0]} wrong)"
        intervals(axes, rows, "auc", "place", "auc", index, label)
    axes.axvline(0.5, color="#555555", linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="AUC for a right answer", xlim=(-0.03, 1.03), ylim=(len(names) - 0.5, -0.5))
    legend_below(figure, axes, columns=4)
    return figure


LATENT_FIGURES: dict[str, Callable[[Tables, Mapping[str, Any]], Figure]] = {
    draw.__name__: draw
    for draw in (
        *(lens, errors, counterfactual, interventions, need, probes),
        *(kinds, latents, distances, attention, signals),
    )
}


def draw_all(tables: Tables, summary: Mapping[str, Any], folder: Path) -> None:
    """Draw the figures of a study as `folder/{name}.png`; as .svg too they would take as long as
    the study."""
    figures = dict(LATENT_FIGURES) if summary["latent"] else {}
    for name, draw in (figures | SPACE_FIGURES).items():
        with matplotlib.rc_context(STYLE):
            figure = draw(tables, summary)
        save(figure, folder, name, formats=("png",))
