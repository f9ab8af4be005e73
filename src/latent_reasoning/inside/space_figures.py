"""The figures of any model's space and depth (E, F), as in the papers that they follow.

Attention is blue and round, MLPs red and triangular, embeddings green and square; dark is early in
depth, light late. Positions run along a sequential map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import matplotlib
import numpy
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from latent_reasoning.analysis.style import (
    MARKERS,
    PALETTE,
    legend_below,
    nothing_to_show,
    page,
)
from latent_reasoning.inside.drawing import Tables, heat_map, look, whole_numbers

MAPS = {"embedding": "Greens_r", "attention": "Blues_r", "mlp": "Reds_r"}
SHAPES = {"embedding": "s", "attention": "o", "mlp": "^"}
POSITIONS = "viridis"


def component_of(part: str) -> str:
    """embedding, attention or mlp, by a state's name."""
    return part.split("_")[0]


def colour_of(part: str, block: int, blocks: int) -> tuple:
    """Dark early in depth, light late."""
    shade = 0.1 + 0.6 * max(block, 0) / max(1, blocks - 1)
    return matplotlib.colormaps[MAPS[component_of(part)]](shade)


def norms(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """F1 to F4: mean norms by position, of single tokens, and by layer without position 0."""
    table, single, blocks = tables["norms"], tables["single_tokens"], summary["blocks"]
    figure, grid = page(2, 2, 5.6)
    stream = table[table["part"].isin(("embedding", "mlp_stream"))]
    for (part, block), rows in stream.groupby(["part", "block"]):
        colour = colour_of(part, block, blocks)
        label = "embedding" if block < 0 else f"after block {block}"
        shown = label if block in (-1, 0, blocks - 1) else None
        grid[0][0].plot(rows["position"], rows["norm"], color=colour, label=shown)
    grid[0][0].set(yscale="log", xlabel="position", ylabel="mean L2 norm", title="F1 by position")
    grid[0][0].legend(fontsize=7)
    for index, block in enumerate(sorted({0, blocks // 2, blocks - 1})):
        values = single[f"mlp_stream_{block}"]
        style = {"color": PALETTE[index], "histtype": "step", "linewidth": 1.5}
        grid[0][1].hist(values, bins=40, label=f"after block {block}", **style)
    title = f"F2 single tokens (n = {len(single)})"
    grid[0][1].set(xlabel="L2 norm", ylabel="tokens", title=title)
    grid[0][1].legend(fontsize=7)
    columns = ["embedding_-1", *(f"mlp_stream_{b}" for b in range(blocks))]
    _by_layer(grid[1][0], single[columns].mean(), single[columns].std(), "F3 single tokens")
    later = stream[stream["position"] > 0].groupby("block")["norm"]
    _by_layer(grid[1][1], later.mean(), later.std(), "F4 texts, without position 0")
    return figure


def _by_layer(axes: Axes, mean: pandas.Series, deviation: pandas.Series, title: str) -> None:
    """Mean norms by layer with their standard deviation."""
    layers = range(len(mean))
    axes.errorbar(layers, mean, yerr=deviation, color=PALETTE[0], marker="o", ms=4, capsize=2)
    axes.set(xlabel="layer (0: embedding)", ylabel="mean L2 norm", title=title)
    whole_numbers(axes.xaxis)


def _scatter(axes: Axes, rows: pandas.DataFrame, blocks: int, size: float) -> None:
    """Points in the colours of part and depth."""
    for (part, block), group in rows.groupby(["part", "block"], sort=False):
        name = component_of(part)
        shown = block in (-1, 0) or (name not in axes.get_legend_handles_labels()[1])
        axes.scatter(
            group["c1"],
            group["c2"],
            s=size,
            color=colour_of(part, block, blocks),
            marker=SHAPES[name],
            label=name if shown and name not in axes.get_legend_handles_labels()[1] else None,
            linewidths=0,
            rasterized=True,
        )


def stream(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """F5: PCA of all stream states as unit vectors."""
    return _panels(tables["points"].query("figure == 'stream'"), summary, "F5", 10)


def parts(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """F6, F7: attention's against the MLP's outputs; UMAP where it was made."""
    return _panels(tables["points"].query("figure == 'parts'"), summary, "F6", 7)


def _panels(points: pandas.DataFrame, summary: Mapping[str, Any], name: str, size: float) -> Figure:
    panels = list(dict.fromkeys(points["panel"]))
    figure, grid = page(1, len(panels), 3.6)
    for axes, panel in zip(grid[0], panels, strict=True):
        rows = points[points["panel"] == panel]
        _scatter(axes, rows, summary["blocks"], size)
        explained = rows["explained"].iloc[0]
        title = "F7 UMAP, cosine" if panel == "umap" else f"{name} {panel} ({explained})"
        axes.set(title=title, xlabel="first", ylabel="second")
    legend_below(figure, grid[0][0], columns=3)
    return figure


def positions_unit(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """F8, F9: means over texts and layers, a point a position, unit vectors."""
    return _pairs(tables["points"].query("figure == 'positions_unit'"))


def positions_raw(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """F10, F11: the same without unit norm and position 0."""
    return _pairs(tables["points"].query("figure == 'positions_raw'"))


def _pairs(rows: pandas.DataFrame) -> Figure:
    """All 15 pairs of six components."""
    if rows.empty:
        return nothing_to_show("too few positions")
    figure, grid = page(3, 5, 5.0)
    for axes, (one, other) in zip(grid.flat, combinations(range(1, 7), 2), strict=True):
        drawn = axes.scatter(
            rows[f"c{one}"], rows[f"c{other}"], c=rows["index"], cmap=POSITIONS, s=7, linewidths=0
        )
        axes.set(xlabel=f"PC {one}", ylabel=f"PC {other}", xticks=[], yticks=[])
    figure.colorbar(drawn, ax=grid, label="position", shrink=0.6)
    return figure


def kinds(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """Question, START, latents and answer in the space of all stream states, block by block."""
    table = tables["kinds"]
    names = list(dict.fromkeys(table["kind"]))
    figure, grid = page(1, 1, 3.8)
    axes = grid[0][0]
    colours = matplotlib.colormaps[POSITIONS](numpy.linspace(0, 0.95, max(1, len(names) - 2)))
    inner = iter(colours)
    for index, name in enumerate(names):
        rows = table[table["kind"] == name].sort_values("block")
        colour = {"question": "#000000", "answer": PALETTE[1]}.get(name)
        colour = next(inner) if colour is None else colour
        axes.plot(rows["c1"], rows["c2"], color=colour, lw=1, marker=MARKERS[index % 8], label=name)
        axes.annotate("", rows[["c1", "c2"]].iloc[-1], rows[["c1", "c2"]].iloc[-2])
    axes.set(xlabel="PC 1 of all stream states", ylabel="PC 2", title="embedding to last block")
    legend_below(figure, axes, columns=5)
    return figure


def depth(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """F: norms, relative contributions and cosines of each block, by kind of position."""
    table = tables["depth"].query("operations == 0")
    groups = list(dict.fromkeys(table["group"]))
    figure, grid = page(3, len(groups), 6.6, sharex=True, sharey="row")
    for column, group in enumerate(groups):
        for row, (measure, names) in enumerate(
            {
                "norm": ("attention", "mlp", "stream"),
                "relative": ("attention", "mlp", "both"),
                "cosine": ("attention", "mlp", "both"),
            }.items()
        ):
            axes = grid[row][column]
            for name in names:
                rows = table[(table["group"] == group) & (table["measure"] == f"{measure}_{name}")]
                colour = {"attention": PALETTE[0], "mlp": PALETTE[1]}.get(name, "black")
                style = {"color": colour, "marker": SHAPES.get(name, "D"), "ms": 4}
                axes.plot(rows["block"], rows["mean"], label=name, **style)
                axes.fill_between(rows["block"], rows["low"], rows["high"], color=colour, alpha=0.2)
            if measure != "cosine":
                axes.set_yscale("log")
            axes.set(title=f"{group}: {measure}", xlabel="block" if row == 2 else "")
            whole_numbers(axes.xaxis)
            axes.legend(fontsize=6)
    return figure


def layers(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """F: the lens by layer against the output, by kind of position and by K."""
    table = tables["depth"]
    figure, grid = page(2, 2, 5.2, sharex=True)
    for row, (measure, words) in enumerate(
        (("kl", "KL to the output, nats"), ("overlap", "overlap of the top five"))
    ):
        cells = table[table["measure"] == measure]
        every = cells[cells["operations"] == 0]
        for index, (group, rows) in enumerate(every.groupby("group", sort=False)):
            grid[row][0].plot(rows["block"] + 1, rows["mean"], label=group, **look(index))
        group = "latent" if "latent" in set(cells["group"]) else "answer"
        by_operations = cells[(cells["group"] == group) & (cells["operations"] > 0)]
        for index, (k, rows) in enumerate(by_operations.groupby("operations")):
            grid[row][1].plot(rows["block"] + 1, rows["mean"], label=f"K = {k}", **look(index))
        for axes, title in zip(grid[row], ("by position", f"{group} positions, by K"), strict=True):
            axes.set(title=title, xlabel="layer (0: embedding)", ylabel=words)
            whole_numbers(axes.xaxis)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
    return figure


def skips(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """F: what skipping a block changes in later blocks, everywhere and at later positions."""
    table = tables["skips"]
    if table.empty:
        return nothing_to_show("a model of one block has none that could be skipped before another")
    table = table[(table["operations"] == 0) & (table["group"] == "every")]
    figure, grid = page(1, 2, 3.2)
    top = float(table["mean"].max())
    for axes, where in zip(grid[0], ("all", "later"), strict=True):
        cells = table[table["where"] == where]
        matrix = cells.pivot(index="skipped", columns="block", values="mean")
        matrix = matrix.reindex(index=range(summary["blocks"]), columns=range(summary["blocks"]))
        title = f"{where} positions"
        drawn = heat_map(axes, matrix, title, "changed block", "skipped block", top=top)
        whole_numbers(axes.xaxis, axes.yaxis)
    figure.colorbar(drawn, ax=grid, label="relative change", shrink=0.8)
    return figure


SPACE_FIGURES: dict[str, Callable[[Tables, Mapping[str, Any]], Figure]] = {
    "norms": norms,
    "stream": stream,
    "parts": parts,
    "positions_unit": positions_unit,
    "positions_raw": positions_raw,
    "depth": depth,
    "layers": layers,
    "skips": skips,
}
