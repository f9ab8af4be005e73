"""Drawings of the measurements: ratios as bars, and how the cost grows as lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from latent_reasoning.analysis.style import AFTER, BEFORE, STYLE, WIDTH

if TYPE_CHECKING:
    from benchmarks.measure import Figure
    from benchmarks.scaling import Point

COLOURS = {"naive": BEFORE, "fast": AFTER}
WORKLOAD_NAMES = {
    "latent_sft": "latent SFT step",
    "cot_sft": "CoT SFT step",
    "evaluation_adaptive": "evaluation, adaptive",
    "evaluation_forced": "evaluation, 6 forced steps",
    "evaluation": "evaluation, adaptive and 0 to 10 forced",
    "grpo_rollout": "GRPO rollout",
    "grpo_update": "GRPO update",
    "grpo_step": "GRPO step",
}
METRIC_NAMES = {"seconds": "seconds", "peak_memory_mib": "peak memory, MiB"}
RATIO_COLOURS = {"seconds": AFTER, "gflop": BEFORE, "peak_memory_mib": "#009E73"}
RATIO_NAMES = {"seconds": "time", "gflop": "operations (FLOPs)", "peak_memory_mib": "peak memory"}


def draw_summary(figures: Sequence[Figure]) -> Drawing:
    """How many times less time, operations and memory the fast path takes: a bar each."""
    workloads = list(dict.fromkeys(figure.workload for figure in figures))
    bars = {
        metric: {f.workload: f.ratio for f in figures if f.metric == metric}
        for metric in RATIO_NAMES
    }
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(figsize=(WIDTH, 1.1 + 0.55 * len(workloads)), layout="constrained")
        axes = drawing.subplots()
        for place, (metric, ratios) in enumerate(bars.items()):
            heights = [workloads.index(name) + 0.27 * (place - 1) for name in ratios]
            drawn = axes.barh(
                heights,
                list(ratios.values()),
                height=0.25,
                color=RATIO_COLOURS[metric],
                label=RATIO_NAMES[metric],
            )
            axes.bar_label(drawn, [f"{ratio:.1f}×" for ratio in ratios.values()], padding=3)
        axes.axvline(1, color="#555555", linewidth=0.8)
        axes.set_yticks(range(len(workloads)), [WORKLOAD_NAMES[name] for name in workloads])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.1)
        axes.set_xlabel("naive / fast")
        drawing.legend(loc="outside lower center", ncols=len(bars))
    return drawing


def draw_scaling(points: Sequence[Point]) -> Drawing:
    """A row a workload and metric, a column an axis; the ratio stands above both ends."""
    rows = list(dict.fromkeys((p.figure.workload, p.figure.metric) for p in points))
    axes_of = {
        workload: list(dict.fromkeys(p.axis for p in points if p.figure.workload == workload))
        for workload, _ in rows
    }
    columns = max(map(len, axes_of.values()))
    with matplotlib.rc_context(STYLE):
        drawing = Drawing(figsize=(WIDTH, 0.5 + 1.9 * len(rows)), layout="constrained")
        grid = drawing.subplots(len(rows), columns, squeeze=False, sharey="row")
        for axes_row, (workload, metric) in zip(grid, rows, strict=True):
            for axes, axis in zip(axes_row, axes_of[workload], strict=True):
                chosen = {
                    p.value: p.figure
                    for p in points
                    if (p.figure.workload, p.figure.metric, p.axis) == (workload, metric, axis)
                }
                _lines(axes, chosen)
                axes.set_xlabel(axis.replace("_", " "))
            axes_row[0].set_ylabel(METRIC_NAMES[metric])
            axes_row[0].set_title(WORKLOAD_NAMES[workload])
        handles, labels = grid[0][0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=len(COLOURS))
    return drawing


def _lines(axes: Axes, figures: dict[int, Figure]) -> None:
    """Both paths over an axis' values; logarithmic, but for values that begin at 0."""
    values = list(figures)
    for path, colour in COLOURS.items():
        heights = [getattr(figure, path) for figure in figures.values()]
        axes.plot(values, heights, marker="o", markersize=3.5, color=colour, label=path)
    axes.set_yscale("log")
    if values[0] > 0:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.14, y=0.22)
    for value in (values[0], values[-1]):
        axes.annotate(
            f"{figures[value].ratio:.1f}×",
            (value, figures[value].naive),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
