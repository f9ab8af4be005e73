"""The rivals' figures: accuracy against latents and operations, and a small panel a method.

Colour and marker tell the kind of method, a number at the point which one it is. A method that can
be made longer or shorter has a line: accuracy after every forced number of latent steps, or the
models that `report.rivals.lines` joins.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from latent_reasoning.analysis.compute import reasoning_operations, reasoning_weights
from latent_reasoning.analysis.results import Results
from latent_reasoning.analysis.rivals import rivals_of
from latent_reasoning.analysis.style import PALETTE, nothing_to_show, page, share_axis
from latent_reasoning.analysis.tables import forced_table
from latent_reasoning.dag.cost import size_of

KINDS = {
    "sft": ("text", PALETTE[6], "s"),
    "latent_sft": ("latent SFT", PALETTE[0], "o"),
    "rl": ("RL on it", PALETTE[1], "D"),
    "curriculum": ("curriculum", PALETTE[2], "^"),
    "teacher_forced": ("teacher-forced", PALETTE[3], "v"),
    "policy": ("RL, its own policy", PALETTE[4], "P"),
    "decode": ("decoding only", PALETTE[5], "X"),
    "import": ("brought in", PALETTE[7], "*"),
}
"""In words, colour and marker of a method, by the stage that makes it."""

COLUMNS, GREY = 4, "#bbbbbb"
TITLE_WIDTH = 24
"""Characters in a line of a small panel's title."""
FEW = 6
"""Forced lines of more models than this stand in their own figure alone."""


@dataclass(frozen=True)
class Curve:
    """A line of the figures: `latents`, `flop` and `accuracy` of its points, each of them a model
    (`joined`) or a forced number of steps."""

    model: str
    joined: bool
    latents: numpy.ndarray
    flop: numpy.ndarray
    accuracy: numpy.ndarray


def curves_of(results: Results, table: pandas.DataFrame) -> list[Curve]:
    """The lines of `report.rivals.lines`, and of every other model that takes forced steps, in the
    table's order."""
    size, dataset, own = size_of(results.experiment), results.datasets[0], table.set_index("model")
    curves, joined = [], set()
    for line in results.experiment.report.rivals.lines.values():
        names = [name for name in line if name in own.index]
        if not names:
            continue
        points = own.loc[names].sort_values("latents")
        columns = (points[key].to_numpy() for key in ("latents", "reasoning_flop", "accuracy"))
        curves.append(Curve(names[0], True, *columns))
        joined |= set(names)
    forced = forced_table(results)
    for model, rows in forced[forced["dataset"] == dataset].groupby("model", sort=False):
        if len(rows) > 1 and model not in joined:
            steps = rows["latent_steps"].to_numpy()
            weights = reasoning_weights(results, size, model, latent=True)
            flop = [reasoning_operations(n + 2, n, weights) for n in steps]
            curves.append(
                Curve(model, False, steps, numpy.array(flop), rows["accuracy"].to_numpy())
            )
    return sorted(curves, key=lambda curve: own.index.get_loc(curve.model))


# ------------------------------------------------------------------------------------ overview


def rivals_figure(results: Results, table: pandas.DataFrame) -> Figure:
    """Accuracy against the latents of a row, and against the operations of its reasoning.

    Methods without latents are dotted lines on the left, points on the right; those whose
    operations are not counted stand on the left alone. `table` is that of
    `rivals_table`.
    """
    results = rivals_of(results)
    if not results.models:
        return nothing_to_show("This experiment compares no methods (report.rivals).")
    table = table[table["dataset"] == results.datasets[0]].reset_index(drop=True)
    rows = -(-len(table) // COLUMNS)
    figure, grid = page(1, 2, 4.5 + 0.17 * rows, sharey=True)
    curves = curves_of(results, table)
    curves = curves if len(curves) <= FEW else [curve for curve in curves if curve.joined]
    for axes, column in zip(grid[0], ("latents", "reasoning_flop"), strict=True):
        for curve in curves:
            x = curve.latents if column == "latents" else curve.flop
            colour = KINDS[results.stage(curve.model)][1]
            axes.plot(x, curve.accuracy, color=colour, linewidth=0.8, alpha=0.35, zorder=1)
        _points(axes, results, table, column)
    grid[0][0].set_xlabel("latents a row (mean); dotted: methods without")
    grid[0][1].set_xlabel("operations of a row's reasoning")
    grid[0][0].set_ylabel(f"accuracy on {results.datasets[0]}")
    grid[0][1].ticklabel_format(axis="x", useMathText=True)
    share_axis(grid[0][0])
    _key(figure, results, table)
    figure.draw_without_rendering()  # the labels are placed in pixels
    for axes, column in zip(grid[0], ("latents", "reasoning_flop"), strict=True):
        _number_points(axes, results, table, column)
    return figure


def _points(axes: Axes, results: Results, table: pandas.DataFrame, column: str) -> None:
    """A point with its interval for each model; on the left, a dotted line for one without
    latents."""
    for row in table.to_dict("records"):
        _, colour, marker = KINDS[results.stage(row["model"])]
        if column == "latents" and row["latents"] == 0:
            axes.axhline(row["accuracy"], color=colour, linestyle=":", linewidth=1)
            continue
        if pandas.isna(row[column]):  # not counted
            continue
        low, high = row["accuracy_ci95_low"], row["accuracy_ci95_high"]
        axes.errorbar(
            row[column],
            row["accuracy"],
            yerr=[[row["accuracy"] - low], [high - row["accuracy"]]],
            fmt=marker,
            color=colour,
            markerfacecolor="white",
            markersize=6,
            capsize=2,
            elinewidth=1,
        )
    axes.margins(x=0.08)


def _number_points(axes: Axes, results: Results, table: pandas.DataFrame, column: str) -> None:
    """The number of each model near its point, where no other number or point stands, in its
    colour and with a thin line."""
    scale, points = axes.figure.dpi / 72, table[table[column].notna()]
    without = (points["latents"] == 0) & (column == "latents")
    x = points[column].mask(without, axes.get_xlim()[1])
    at = numpy.column_stack((x, points["accuracy"]))
    places = axes.transData.transform(at)
    taken = list(places)
    for model, index, point, place in zip(points["model"], points.index, at, places, strict=True):
        offsets = _offsets(leftwards=without[index])
        offset = next(o for o in offsets if _is_free(place + scale * o, taken, 11 * scale, axes))
        taken.append(place + scale * offset)
        axes.annotate(
            str(index + 1),
            point,
            xytext=tuple(offset),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            color=KINDS[results.stage(model)][1],
            arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.5, "shrinkA": 4},
        )


def _offsets(leftwards: bool) -> list[numpy.ndarray]:
    """Places to try for a number, in points from its own, the nearest first."""
    angles = numpy.deg2rad([-60, -120, 60, 120, -30, -150, 30, 150, -90, 90, 0, 180])
    angles = angles[numpy.cos(angles) <= 1e-9] if leftwards else angles
    return [
        radius * numpy.array([numpy.cos(angle), numpy.sin(angle)])
        for radius in range(13, 400, 9)
        for angle in angles
    ]


def _is_free(place: numpy.ndarray, taken: list[numpy.ndarray], apart: float, axes: Axes) -> bool:
    """Whether a number has room there; it has to stand within the axes."""
    inside = axes.bbox.padded(-apart / 2).contains(*place)
    return inside and all(numpy.abs(place - other).max() >= apart for other in taken)


def _key(figure: Figure, results: Results, table: pandas.DataFrame) -> None:
    """Above: the kinds of methods; below: which number is which model."""
    models, kinds = [], {}
    for index, model in enumerate(table["model"]):
        words, colour, marker = KINDS[results.stage(model)]
        point: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markerfacecolor": "white",
            "linestyle": "none",
        }
        models.append(Line2D([], [], label=f"{index + 1}  {model}", markersize=5, **point))
        kinds[words] = Line2D([], [], label=words, markersize=6, **point)
    figure.legend(handles=[*kinds.values()], loc="outside upper center", ncols=COLUMNS)
    figure.legend(handles=models, loc="outside lower center", ncols=COLUMNS, columnspacing=1.2)


# -------------------------------------------------------------------------------------- curves


def rivals_curves(results: Results, table: pandas.DataFrame) -> Figure:
    """A panel for each method with a line: its own in colour, those of the others in grey."""
    results, curves = rivals_of(results), []
    if results.models:
        table = table[table["dataset"] == results.datasets[0]].reset_index(drop=True)
        curves = curves_of(results, table)
    if not curves:
        return nothing_to_show("No method of this experiment can be made longer or shorter.")
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure, grid = page(rows, columns, 0.7 + 1.6 * rows, sharex=True, sharey=True)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    every = [_joined(getattr(c, name) for c in curves) for name in ("latents", "accuracy")]
    for axes, curve in zip(grid.flat, curves, strict=False):
        axes.plot(*every, color=GREY, linewidth=0.7, zorder=1)
        colour = KINDS[results.stage(curve.model)][1]
        axes.plot(curve.latents, curve.accuracy, color=colour, marker=".", markersize=5, zorder=3)
        _points(axes, results, table[table["model"] == curve.model], "latents")
        number = table.index[table["model"] == curve.model][0] + 1
        axes.set_title(textwrap.fill(f"{number}  {curve.model}", TITLE_WIDTH))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    share_axis(grid[0][0])
    figure.supxlabel("latent steps n, forced or as the method's speed gives them", fontsize=9)
    figure.supylabel(f"accuracy on {results.datasets[0]}", fontsize=9)
    return figure


def _joined(parts: Iterable[numpy.ndarray]) -> numpy.ndarray:
    """The coordinates of all lines as those of one with gaps, which makes a smaller file."""
    return numpy.concatenate([numpy.append(part.astype(float), numpy.nan) for part in parts])


RIVAL_FIGURES = {"rivals": rivals_figure, "rivals_curves": rivals_curves}
"""Every figure by its file name; `workflow/report/{name}.rst` is its caption."""
