"""What the figures of a study share: heat maps with their numbers, intervals, colours, ticks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from latent_reasoning.analysis.style import MARKERS, PALETTE

Tables = Mapping[str, pandas.DataFrame]
SEQUENTIAL = "cividis"
"""The map of heat maps: one lightness scale, the same for the colour-blind."""
MOST_WRITTEN, MOST_NAMED = 8, 16
"""Rows of a heat map that has numbers in its cells; rows or columns that are all named, at most."""


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers."""
    axis.set_major_locator(MaxNLocator(integer=True))


def look(index: int) -> dict[str, Any]:
    """Colour and marker of the index-th line."""
    return {"color": PALETTE[index % 8], "marker": MARKERS[index % 8]}


def heat_map(
    axes: Axes, table: pandas.DataFrame, title: str, x: str, y: str, top: float | None = None
) -> AxesImage:
    """Shares 0 to 1 with their per cent in the cells, or, with `top`, numbers 0 to `top`; index
    down, columns across."""
    values = table.to_numpy(dtype=float)
    drawn = axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=top or 1, aspect="auto")
    if len(values) <= MOST_WRITTEN:
        for (row, column), value in numpy.ndenumerate(values):
            colour = "black" if value > 0.6 * (top or 1) else "white"
            text = f"{100 * value:.0f}" if top is None else f"{value:.2f}"
            if not numpy.isnan(value):
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    for axis, names in ((axes.xaxis, table.columns), (axes.yaxis, table.index)):
        shown = range(0, len(names), max(1, -(-len(names) // MOST_NAMED)))
        axis.set_ticks(shown, [str(names[i]) for i in shown])
    axes.grid(visible=False)
    axes.set(title=title, xlabel=x, ylabel=y)
    return drawn


def intervals(
    axes: Axes, rows: pandas.DataFrame, x: str, y: str, of: str, index: int, label: str
) -> None:
    """Points in the index-th look, with the interval `low` to `high` of the column `of`, x or y."""
    reach = [rows[of] - rows["low"], rows["high"] - rows[of]]
    style = {"linestyle": "none", "capsize": 2, "label": label, **look(index)}
    style["xerr" if of == x else "yerr"] = reach
    axes.errorbar(rows[x], rows[y], **style)
