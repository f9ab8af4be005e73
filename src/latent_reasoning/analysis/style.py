"""The style of every figure: colours, sizes, axes and file formats.

A model keeps its colour in every figure; an RL model has the colour of the model it started from,
dashed and with a filled marker. The colours are Okabe and Ito's, distinct for colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from latent_reasoning.analysis.results import Results
from latent_reasoning.runtime.files import atomic_file

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
BEFORE, AFTER = "#999999", "#0072B2"
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
WIDTH = 8.0
"""Inches: the width of the page's column, so that text is drawn at the size at which it is read."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "savefig.dpi": 160,
    # Equal input gives equal bytes: element ids come from a fixed salt, not from a random one.
    "svg.hashsalt": "latent-reasoning",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """How a model is drawn."""

    colour: str
    marker: str
    trained_by_rl: bool

    @property
    def line(self) -> dict:
        """Line properties."""
        return {"color": self.colour, "linestyle": "--" if self.trained_by_rl else "-"}

    @property
    def point(self) -> dict:
        """Marker properties: hollow before RL, filled after."""
        face = self.colour if self.trained_by_rl else "white"
        return {
            "marker": self.marker,
            "markerfacecolor": face,
            "markeredgecolor": self.colour,
            "markersize": 6,
        }


def looks(results: Results) -> dict[str, Look]:
    """A look for every model; models trained by RL share the colour of their start model."""
    families: dict[str, int] = {}
    chosen = {}
    parents = {pair.model: pair.reference for pair in results.rl_pairs()}
    for model in results.models:
        root = model
        while root in parents:
            root = parents[root]
        family = families.setdefault(root, len(families))
        colour = PALETTE[family % len(PALETTE)]
        # The ninth family has the first one's colour again, with another marker.
        marker = MARKERS[(family + family // len(PALETTE)) % len(MARKERS)]
        chosen[model] = Look(colour, marker, trained_by_rl=root != model)
    return chosen


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png", "svg")) -> None:
    """Write a figure as `folder/{name}.png` and `.svg`."""
    with matplotlib.rc_context(STYLE):
        for suffix in formats:
            metadata = {"png": {"Software": None}, "svg": {"Date": None}}[suffix]
            with atomic_file(folder / f"{name}.{suffix}") as temporary:
                figure.savefig(temporary, metadata=metadata)


def page(rows: int, columns: int, height: float, **keywords) -> tuple[Figure, numpy.ndarray]:
    """A figure of the page's width and of `height` in inches, and its 2-D array of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


def nothing_to_show(why: str) -> Figure:
    """A figure that says why it is empty, so that every experiment has the same files."""
    figure = Figure(figsize=(WIDTH, 1.2), layout="constrained")
    figure.text(0.5, 0.5, why, ha="center", va="center", color="#555555")
    return figure


def legend_below(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """One legend below the figure for all axes, with the entries of `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def per_cent(axis: Axis) -> None:
    """Show shares as per cent, with the decimals that each tick needs."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:g} %")


def share_axis(axes: Axes) -> None:
    """Show the whole range of 0 to 100 %, with a margin."""
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_ticks(numpy.linspace(0, 1, 6))
    per_cent(axes.yaxis)
