"""The measurements as a table and as figures: bars of the ratios, lines of the growing cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.measure import Measurement
from latent_reasoning.analysis.style import AFTER, BEFORE, STYLE, legend_below, page, save
from latent_reasoning.runtime.files import write_text_atomically

COLUMNS = ["workload", "axis", "value", "metric", "naive", "fast", "ratio"]
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
RATIOS = {
    "seconds": {"label": "time", "color": AFTER},
    "gflop": {"label": "operations (FLOPs)", "color": BEFORE},
    "peak_memory_mib": {"label": "peak memory", "color": "#009E73"},
}


def as_table(measured: Sequence[Measurement]) -> pandas.DataFrame:
    """`workload, metric, naive, fast, ratio`; for the scaling also `axis` and `value`."""
    rows = [[getattr(one, name) for name in COLUMNS] for one in measured]
    return pandas.DataFrame(rows, columns=COLUMNS).dropna(axis=1, how="all")


def write(measured: Sequence[Measurement], figure: Figure, output: Path) -> None:
    """Write the table as CSV with six significant digits, and its figure beside it."""
    text = as_table(measured).to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_text_atomically(output, text)
    save(figure, output.parent, output.stem)


def draw_summary(measured: Sequence[Measurement]) -> Figure:
    """Bars of the ratios naive / fast of time, operations and memory."""
    workloads = list(dict.fromkeys(one.workload for one in measured))
    with matplotlib.rc_context(STYLE):
        figure, ((axes,),) = page(1, 1, 1.1 + 0.55 * len(workloads))
        for place, (metric, look) in enumerate(RATIOS.items()):
            ratios = {one.workload: one.ratio for one in measured if one.metric == metric}
            heights = [workloads.index(name) + 0.27 * (place - 1) for name in ratios]
            drawn = axes.barh(heights, list(ratios.values()), height=0.25, **look)
            axes.bar_label(drawn, [f"{ratio:.1f}×" for ratio in ratios.values()], padding=3)
        axes.axvline(1, color="#555555", linewidth=0.8)
        axes.set_yticks(range(len(workloads)), [WORKLOAD_NAMES[name] for name in workloads])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.1)
        axes.set_xlabel("naive / fast")
        figure.legend(loc="outside lower center", ncols=len(RATIOS))
    return figure


def draw_scaling(points: Sequence[Measurement]) -> Figure:
    """A row per workload and metric, a column per axis; the ratio is shown at both ends."""
    panels: dict[tuple[str, str], dict[str, dict[int, Measurement]]] = {}
    for point in points:
        row = panels.setdefault((point.workload, point.metric), {})
        row.setdefault(point.axis, {})[point.value] = point
    columns = max(map(len, panels.values()))
    with matplotlib.rc_context(STYLE):
        figure, grid = page(len(panels), columns, 0.5 + 1.9 * len(panels), sharey="row")
        for axes_row, ((workload, metric), row) in zip(grid, panels.items(), strict=True):
            for axes, (axis, measured) in zip(axes_row, row.items(), strict=True):
                _lines(axes, measured)
                axes.set_xlabel(axis.replace("_", " "))
            axes_row[0].set_ylabel(METRIC_NAMES[metric])
            axes_row[0].set_title(WORKLOAD_NAMES[workload])
        legend_below(figure, grid[0][0])
    return figure


def _lines(axes: Axes, measured: dict[int, Measurement]) -> None:
    """Both paths over an axis' values; scales are logarithmic, unless the values begin at 0."""
    values = list(measured)
    for path, colour in COLOURS.items():
        heights = [getattr(one, path) for one in measured.values()]
        axes.plot(values, heights, marker="o", markersize=3.5, color=colour, label=path)
    axes.set_yscale("log")
    if values[0] > 0:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_locator(NullLocator())
    axes.margins(x=0.14, y=0.22)
    above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    for value in (values[0], values[-1]):
        one = measured[value]
        axes.annotate(f"{one.ratio:.1f}×", (value, one.naive), **above)
