"""What was found, in numbers, each with its interval and its control: a table of a study.

Which numbers stand here was decided before any was seen: v_m is looked for in h_(m-1), which is
what the m-th step reads, and z_m is held to carry v_m.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import pandas

from latent_reasoning.evaluation.metrics import wilson_interval

COLUMNS = ("analysis", "finding", "value", "low", "high", "n", "control", "unit")
NAN = float("nan")
Tables = Mapping[str, pandas.DataFrame]


def findings(tables: Tables, summary: Mapping[str, Any]) -> pandas.DataFrame:
    """`analysis` (its letter), `finding` in words, `value, low, high, n, control`, `unit`."""
    lines: list[tuple] = []
    if summary["latent"]:
        lines += [*_lens(tables["lens"]), *_errors(tables["errors"]), *_causes(tables)]
        lines += [*_need(summary["need"]), *_probes(tables["probes"], summary["blocks"])]
    lines += [*_geometry(tables["norms"], summary), *_depth(tables, summary)]
    if summary["latent"]:
        lines += [*_attention(tables["attention"]), *_signals(tables["signal_areas"])]
    return pandas.DataFrame(lines, columns=list(COLUMNS)).astype({"n": int})


def _pooled(table: pandas.DataFrame) -> tuple[float, float, float, int]:
    """Share, interval and n over the cells of a table."""
    n, correct = int(table["n"].sum()), int(table["correct"].sum())
    return (correct / n, *wilson_interval(correct, n), n) if n else (NAN, NAN, NAN, 0)


def _lens(lens: pandas.DataFrame) -> Iterator[tuple]:
    cells = lens[(lens["answers"] == "right") & (lens["step"] == lens["value"] - 1)]
    for role, words in (
        ("intermediate", "v_m, m < K, is the likeliest word of h_(m-1)"),
        ("answer", "the answer v_K is the likeliest word of h_(K-1)"),
    ):
        of_role = cells[cells["role"] == role]
        control = _pooled(of_role[of_role["reading"] == "control_top1"])[0]
        yield "A", words, *_pooled(of_role[of_role["reading"] == "top1"]), control, "share"


def _errors(errors: pandas.DataFrame) -> Iterator[tuple]:
    """Among rows with values m < K: is one read wrong, and is the answer what follows from it?"""
    every = errors[(errors["operations"] == 0) & (errors["entered"] == 0)].set_index("answers")
    if "wrong" not in every.index:
        return
    wrong, numbers = every.loc["wrong"], ["accuracy", "low", "high", "n"]
    control = every.loc["right", "accuracy"] if "right" in every.index else NAN
    words = "an intermediate value is read wrong where the answer is wrong (control: right)"
    yield "A", words, *wrong[numbers], control, "share"
    if wrong["follows_n"]:
        words = "a wrong answer is exactly what follows from the first value read wrong"
        follows = [wrong[f"follows_{name}"] for name in numbers]
        yield "A", words, *follows, wrong["chance"], "share"


def _causes(tables: Tables) -> Iterator[tuple]:
    effects, shares = tables["interventions"], tables["counterfactual"]
    if len(shares):
        cells = shares[(shares["step"] == shares["value"]) & (shares["role"] == "intermediate")]
        pooled = _pooled(cells)
        chance = float((cells["chance"] * cells["n"]).sum() / pooled[-1]) if pooled[-1] else NAN
        words = "with a donor's z_m, the answer is exactly the one that its v_m implies (m < K)"
        yield "B", words, *pooled, chance, "share"
    every = effects[effects["step"] == 0].set_index("kind")
    for kind in ("zero", "mean", "noise", "order", "donor"):
        if kind in every.index:
            row, words = every.loc[kind], f"accuracy with all inputs replaced: {kind}"
            yield "B", words, *row[["accuracy", "low", "high", "n", "untouched"]], "share"


def _need(need: Mapping[str, Any]) -> Iterator[tuple]:
    left = (need["left_mean"], need["left_low"], need["left_high"], need["n"], 0.0)
    exact = (need["exact"], need["exact_low"], need["exact_high"], need["n"], NAN)
    yield "C", "steps taken beyond those needed, a row", *left, "steps"
    yield "C", "rows that stop exactly where they may", *exact, "share"


def _probes(probes: pandas.DataFrame, blocks: int) -> Iterator[tuple]:
    if len(probes):
        last = probes[probes["block"] == blocks]
        own = (last["source"] == "latent") & (last["step"] == last["value"] - 1)
        control = _pooled(last[last["source"] == "question"])[0]
        words = "a ridge probe reads v_m from h_(m-1) (control: from the question's last token)"
        yield "D", words, *_pooled(last[own]), control, "share"


def _geometry(norms: pandas.DataFrame, summary: Mapping[str, Any]) -> Iterator[tuple]:
    parts = norms[norms["part"] == "mlp_stream"]
    stream = parts.pivot(index="block", columns="position", values="norm")
    apart, n = summary["separation"], int(norms["n"].max())
    if len(stream.columns) > 1:  # not only texts of one token
        ratio = stream[0] / stream.drop(columns=0).mean(axis=1)
        where = f"after block {ratio.idxmax()} (largest)"
        words = f"norm of position 0 over that of the others, {where}"
        yield "E", words, float(ratio.max()), NAN, NAN, n, 1.0, "ratio"
    words, numbers = "silhouette of attention's against the MLP's outputs", apart["silhouette"]
    yield "E", words, numbers, NAN, NAN, apart["n"], apart["shuffled"], "silhouette"


def _depth(tables: Tables, summary: Mapping[str, Any]) -> Iterator[tuple]:
    depth, skips = (tables[name].query("operations == 0") for name in ("depth", "skips"))
    depth = depth[depth["measure"] == "relative_both"]
    for group in ("text", "latent"):
        cells = depth[depth["group"] == group].set_index("block")
        if len(cells):
            last = cells.loc[summary["blocks"] - 1]
            half = cells.loc[: summary["blocks"] // 2 - 1, "mean"].mean()
            words = f"contribution of the last block at {group} positions (control: first half's)"
            yield "F", words, *last[["mean", "low", "high", "n"]], half, "relative norm"
    every = skips[skips["group"] == "every"]
    if len(every):
        means = every.groupby("where")["mean"].mean()
        words = "change of later blocks by a skipped one, at later positions (control: at all)"
        n, later = int(every["n"].max()), means.get("later", NAN)
        yield "F", words, later, NAN, NAN, n, means["all"], "relative norm"


def _attention(mass: pandas.DataFrame) -> Iterator[tuple]:
    mean = mass[(mass["head"] == -1) & (mass["operations"] == 0) & (mass["target"] == "latent")]
    for source in ("latent", "answer"):
        cells = mean[mean["source"] == source]
        if len(cells):
            words = f"attention of {source} positions to latents, mean over blocks"
            numbers = cells[["mean", "low", "high"]].mean()
            yield "G", words, *numbers, int(cells["n"].max()), NAN, "share"


def _signals(areas: pandas.DataFrame) -> Iterator[tuple]:
    for row in areas[areas["operations"] == 0].to_dict("records"):
        words = f"AUC of {row['signal']} for a right answer ({row['wrong']} wrong)"
        yield "H", words, row["auc"], row["low"], row["high"], row["n"], 0.5, "AUC"


def in_words(value: float, unit: str) -> str:
    """A number as the page shows it."""
    if value is None or numpy.isnan(value):
        return ""
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.3g}"
