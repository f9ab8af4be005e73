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
from matplotlib.figure import Figure

from latent_reasoning.analysis.style import MARKERS, PALETTE, legend_below, nothing_to_show, page
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
    """F1 to F4: mean norms by position, of single tokens, and by layer with the standard deviation
    over tokens, and over positions but the first."""
    table, single, blocks = tables["norms"], tables["single_tokens"], summary["blocks"]
    figure, ((by_position, histogram), (of_tokens, of_texts)) = page(2, 2, 5.6)
    stream = table[table["part"].isin(("embedding", "mlp_stream"))]
    for (part, block), rows in stream.groupby(["part", "block"]):
        label = "embedding" if block < 0 else f"after block {block}"
        shown = label if block in (-1, 0, blocks - 1) else None
        colour = colour_of(part, block, blocks)
        by_position.plot(rows["position"], rows["norm"], color=colour, label=shown)
    by_position.set(yscale="log", xlabel="position", ylabel="mean L2 norm", title="F1 by position")
    by_position.legend(fontsize=7)
    for index, block in enumerate(sorted({0, blocks // 2, blocks - 1})):
        look_of = {"label": f"after block {block}", "color": PALETTE[index], "linewidth": 1.5}
        histogram.hist(single[f"mlp_stream_{block}"], bins=40, histtype="step", **look_of)
    title = f"F2 single tokens (n = {len(single)})"
    histogram.set(xlabel="L2 norm", ylabel="tokens", title=title)
    histogram.legend(fontsize=7)
    layers = single[["embedding_-1", *(f"mlp_stream_{b}" for b in range(blocks))]]
    later = stream[stream["position"] > 0].groupby("block")["norm"]
    for axes, of, title in (
        (of_tokens, layers, "F3 single tokens"),
        (of_texts, later, "F4 texts, without position 0"),
    ):
        style = {"color": PALETTE[0], "marker": "o", "ms": 4, "capsize": 2}
        axes.errorbar(range(len(of.mean())), of.mean(), yerr=of.std(), **style)
        axes.set(xlabel="layer (0: embedding)", ylabel="mean L2 norm", title=title)
        whole_numbers(axes.xaxis)
    return figure


def stream(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """F5: PCA of all stream states as unit vectors."""
    return _panels(tables["points"].query("figure == 'stream'"), summary, "F5", 10)


def parts(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """F6, F7: attention's against the MLP's outputs; UMAP where it was made."""
    return _panels(tables["points"].query("figure == 'parts'"), summary, "F6", 7)


def _panels(points: pandas.DataFrame, summary: Mapping[str, Any], name: str, size: float) -> Figure:
    """Points in the colours of part and depth."""
    panels = points.groupby("panel", sort=False)
    figure, grid = page(1, len(panels), 3.6)
    for axes, (panel, of_panel) in zip(grid[0], panels, strict=True):
        named: set[str] = set()
        for (part, block), rows in of_panel.groupby(["part", "block"], sort=False):
            component = component_of(part)
            style = {
                "label": None if component in named else component,
                "color": colour_of(part, block, summary["blocks"]),
                "marker": SHAPES[component],
            }
            axes.scatter(rows["c1"], rows["c2"], s=size, linewidths=0, rasterized=True, **style)
            named.add(component)
        title = f"{name} {panel} ({of_panel['explained'].iloc[0]})"
        title = "F7 UMAP, cosine" if panel == "umap" else title
        axes.set(title=title, xlabel="first", ylabel="second")
    legend_below(figure, grid[0][0], columns=3)
    return figure


def positions_unit(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """F8, F9: means over texts and layers, a point a position, unit vectors."""
    rows = tables["points"].query("figure == 'positions_unit'")
    return _pairs(rows, "F8, F9 means over texts and layers, unit vectors")


def positions_raw(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """F10, F11: the same without unit norm and position 0."""
    rows = tables["points"].query("figure == 'positions_raw'")
    return _pairs(rows, "F10, F11 the same, not of unit length, without position 0")


def _pairs(rows: pandas.DataFrame, title: str) -> Figure:
    """All 15 pairs of six components."""
    if rows.empty:
        return nothing_to_show("too few positions")
    figure, grid = page(3, 5, 5.2)
    figure.suptitle(title, fontsize=9)
    style = {"c": rows["index"], "cmap": POSITIONS, "s": 7, "linewidths": 0}
    for axes, (one, other) in zip(grid.flat, combinations(range(1, 7), 2), strict=True):
        drawn = axes.scatter(rows[f"c{one}"], rows[f"c{other}"], **style)
        axes.set(xlabel=f"PC {one}", ylabel=f"PC {other}", xticks=[], yticks=[])
    figure.colorbar(drawn, ax=grid, label="position", shrink=0.6)
    return figure


def kinds(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """Question, START, latents and answer in the space of all stream states, block by block."""
    by_kind = tables["kinds"].groupby("kind", sort=False)
    figure, grid = page(1, 1, 3.8)
    axes = grid[0][0]
    inner = iter(matplotlib.colormaps[POSITIONS](numpy.linspace(0, 0.95, max(1, len(by_kind) - 2))))
    outer = {"question": "#000000", "answer": PALETTE[1]}
    for index, (name, rows) in enumerate(by_kind):
        rows = rows.sort_values("block")
        colour = outer[name] if name in outer else next(inner)
        style = {"marker": MARKERS[index % 8], "label": name}
        axes.plot(rows["c1"], rows["c2"], color=colour, lw=1, **style)
    axes.set(xlabel="PC 1 of all stream states", ylabel="PC 2", title="embedding to last block")
    legend_below(figure, axes, columns=5)
    return figure


def depth(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """F: norms, relative contributions and cosines of each block, by kind of position."""
    groups = tables["depth"].query("operations == 0").groupby("group", sort=False)
    figure, grid = page(3, len(groups), 6.6, sharex=True, sharey="row")
    colours = {"attention": PALETTE[0], "mlp": PALETTE[1]}
    for column, (group, of_group) in zip(grid.T, groups, strict=True):
        by_measure = of_group.groupby("measure")
        for axes, measure in zip(column, ("norm", "relative", "cosine"), strict=True):
            for name in ("attention", "mlp", "stream" if measure == "norm" else "both"):
                rows, colour = by_measure.get_group(f"{measure}_{name}"), colours.get(name, "black")
                style = {"color": colour, "marker": SHAPES.get(name, "D"), "ms": 4}
                axes.plot(rows["block"], rows["mean"], label=name, **style)
                axes.fill_between(rows["block"], rows["low"], rows["high"], color=colour, alpha=0.2)
            if measure != "cosine":
                axes.set_yscale("log")
            axes.set_title(f"{group}: {measure}")
            whole_numbers(axes.xaxis)
            axes.legend(fontsize=6)
        column[-1].set_xlabel("block")
    return figure


def layers(tables: Tables, _: Mapping[str, Any]) -> Figure:
    """F: the lens by layer against the output, by kind of position, and by K where several are."""
    names = {"kl": "KL to the output, nats", "overlap": "overlap of the top five"}
    table = tables["depth"][tables["depth"]["measure"].isin(names)]
    group = "latent" if "latent" in set(table["group"]) else "answer"
    every = table[table["operations"] == 0]
    by_operations = table[(table["group"] == group) & (table["operations"] > 0)]
    panels = [("by position", every.groupby("group", sort=False), "{}")]
    if len(by_operations):
        by_k = by_operations.groupby("operations")
        panels.append((f"{group} positions, by K", by_k, "K = {}"))
    figure, grid = page(2, len(panels), 5.2, sharex=True)
    for row, (measure, words) in zip(grid, names.items(), strict=True):
        for axes, (title, groups, label) in zip(row, panels, strict=True):
            for index, (name, lines) in enumerate(groups):
                cells = lines[lines["measure"] == measure]
                style = {"label": label.format(name), **look(index)}
                axes.plot(cells["block"] + 1, cells["mean"], **style)
            axes.set(title=title, xlabel="layer (0: embedding)", ylabel=words)
            whole_numbers(axes.xaxis)
            axes.legend(fontsize=7)
    return figure


def skips(tables: Tables, summary: Mapping[str, Any]) -> Figure:
    """F: what skipping a block changes in later blocks, everywhere and at later positions."""
    table, blocks = tables["skips"], range(summary["blocks"])
    if table.empty:
        return nothing_to_show("a model of one block has none that could be skipped before another")
    table = table[(table["operations"] == 0) & (table["group"] == "every")]
    figure, grid = page(1, 2, 3.2)
    # A single large cell would leave all others in one colour.
    top = float(table["mean"].quantile(0.98, interpolation="higher"))
    for axes, where in zip(grid[0], ("all", "later"), strict=True):
        cells = table[table["where"] == where]
        matrix = cells.pivot(index="skipped", columns="block", values="mean")
        matrix = matrix.reindex(index=blocks, columns=blocks)
        title = f"{where} positions"
        drawn = heat_map(axes, matrix, title, "changed block", "skipped block", top=top)
    extend = "max" if table["mean"].max() > top else "neither"
    figure.colorbar(drawn, ax=grid, label="relative change", shrink=0.8, extend=extend)
    return figure


SPACE_FIGURES: dict[str, Callable[[Tables, Mapping[str, Any]], Figure]] = {
    draw.__name__: draw
    for draw in (norms, stream, parts, positions_unit, positions_raw, depth, layers, skips)
}
