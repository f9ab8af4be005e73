"""What was found, in numbers, each with its interval and its control: a table of a study.

Which numbers stand here was decided before any was seen: v_m is looked for in h_(m-1), which is
what the m-th step reads, and z_m is held to carry v_m.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import pandas

from latent_reasoning.evaluation.metrics import wilson_interval

COLUMNS = ("analysis", "finding", "value", "low", "high", "n", "control", "unit")
NAN = float("nan")


def findings(
    tables: Mapping[str, pandas.DataFrame], summary: Mapping[str, Any]
) -> pandas.DataFrame:
    """`analysis` (its letter), `finding` in words, `value, low, high, n, control`, `unit`."""
    lines: list[tuple] = []
    if summary["latent"]:
        lines += [
            *_lens(tables["lens"]),
            *_errors(tables["errors"]),
            *_causes(tables),
            *_need(summary["need"]),
        ]
        lines += _probes(tables["probes"], summary["blocks"])
    lines += [*_geometry(tables["norms"], summary), *_depth(tables, summary)]
    if summary["latent"]:
        lines += [*_attention(tables["attention"]), *_signals(tables["signal_areas"])]
    return pandas.DataFrame(lines, columns=list(COLUMNS))


def _pooled(table: pandas.DataFrame) -> tuple[float, float, float, int]:
    """Share, interval and n over the cells of a table."""
    n, correct = int(table["n"].sum()), int(table["correct"].sum())
    return (correct / n, *wilson_interval(correct, n), n) if n else (NAN, NAN, NAN, 0)


def _lens(lens: pandas.DataFrame) -> list[tuple]:
    cells = lens[(lens["answers"] == "right") & (lens["step"] == lens["value"] - 1)]
    lines = []
    for role, words in (
        ("intermediate", "v_m, m < K, is the likeliest word of h_(m-1)"),
        ("answer", "the answer v_K is the likeliest word of h_(K-1)"),
    ):
        of_role = cells[cells["role"] == role].set_index("reading")
        share, low, high, n = _pooled(of_role[of_role.index == "top1"])
        control = _pooled(of_role[of_role.index == "control_top1"])[0]
        lines.append(("A", words, share, low, high, n, control, "share"))
    return lines


def _errors(errors: pandas.DataFrame) -> list[tuple]:
    """Among rows with values m < K: is one read wrong, and is the answer what follows from it?"""
    every = errors[(errors["operations"] == 0) & (errors["entered"] == 0)].set_index("answers")
    if "wrong" not in every.index:
        return []
    wrong, numbers = every.loc["wrong"], ["accuracy", "low", "high", "n"]
    control = every.loc["right", "accuracy"] if "right" in every.index else NAN
    words = "an intermediate value is read wrong where the answer is wrong (control: right)"
    lines = [("A", words, *wrong[numbers], control, "share")]
    if wrong["follows_n"]:
        words = "a wrong answer is exactly what follows from the first value read wrong"
        follows = [wrong[f"follows_{name}"] for name in numbers]
        lines.append(("A", words, *follows, wrong["chance"], "share"))
    return lines


def _causes(tables: Mapping[str, pandas.DataFrame]) -> list[tuple]:
    effects, shares = tables["interventions"], tables["counterfactual"]
    lines = []
    if len(shares):
        cells = shares[(shares["step"] == shares["value"]) & (shares["role"] == "intermediate")]
        share, low, high, n = _pooled(cells)
        chance = float((cells["chance"] * cells["n"]).sum() / n) if n else NAN
        words = "with a donor's z_m, the answer is exactly the one that its v_m implies (m < K)"
        lines.append(("B", words, share, low, high, n, chance, "share"))
    for kind in ("zero", "mean", "noise", "order", "donor"):
        line = effects[(effects["kind"] == kind) & (effects["step"] == 0)]
        for row in line.to_dict("records"):
            words = f"accuracy with all inputs replaced: {kind}"
            low, high = row["low"], row["high"]
            lines.append(
                ("B", words, row["accuracy"], low, high, row["n"], row["untouched"], "share")
            )
    return lines


def _need(need: Mapping[str, Any]) -> list[tuple]:
    left = (need["left_mean"], need["left_low"], need["left_high"], need["n"], 0.0)
    exact = (need["exact"], need["exact_low"], need["exact_high"], need["n"], NAN)
    return [
        ("C", "steps taken beyond those needed, a row", *left, "steps"),
        ("C", "rows that stop exactly where they may", *exact, "share"),
    ]


def _probes(probes: pandas.DataFrame, blocks: int) -> list[tuple]:
    if not len(probes):
        return []
    last = probes[probes["block"] == blocks]
    share, low, high, n = _pooled(
        last[(last["source"] == "latent") & (last["step"] == last["value"] - 1)]
    )
    control = _pooled(last[last["source"] == "question"])[0]
    words = "a ridge probe reads v_m from h_(m-1) (control: from the question's last token)"
    return [("D", words, share, low, high, n, control, "share")]


def _geometry(norms: pandas.DataFrame, summary: Mapping[str, Any]) -> list[tuple]:
    stream = norms[norms["part"] == "mlp_stream"].pivot(
        index="block", columns="position", values="norm"
    )
    ratio = stream[0] / stream.drop(columns=0).mean(axis=1)
    apart, n = summary["separation"], int(norms["n"].max())
    words = f"norm of position 0 over that of the others, after block {ratio.idxmax()} (largest)"
    return [
        ("E", words, float(ratio.max()), NAN, NAN, n, 1.0, "ratio"),
        (
            *("E", "silhouette of attention's against the MLP's outputs", apart["silhouette"]),
            *(NAN, NAN, apart["n"], apart["shuffled"], "silhouette"),
        ),
    ]


def _depth(tables: Mapping[str, pandas.DataFrame], summary: Mapping[str, Any]) -> list[tuple]:
    depth, skips = tables["depth"], tables["skips"]
    lines: list[tuple] = []
    for group in ("text", "latent"):
        cells = depth[
            (depth["group"] == group)
            & (depth["measure"] == "relative_both")
            & (depth["operations"] == 0)
        ].set_index("block")
        if len(cells):
            last = cells.loc[summary["blocks"] - 1]
            half = cells.loc[: summary["blocks"] // 2 - 1, "mean"].mean()
            words = f"contribution of the last block at {group} positions (control: first half's)"
            numbers = (last["mean"], last["low"], last["high"], int(last["n"]), half)
            lines.append(("F", words, *numbers, "relative norm"))
    every = skips[(skips["group"] == "every") & (skips["operations"] == 0)]
    if len(every):
        means = every.groupby("where")["mean"].mean()
        words = "change of later blocks by a skipped one, at later positions (control: at all)"
        n, later = int(every["n"].max()), means.get("later", NAN)
        lines.append(("F", words, later, NAN, NAN, n, means["all"], "relative norm"))
    return lines


def _attention(mass: pandas.DataFrame) -> list[tuple]:
    mean = mass[(mass["head"] == -1) & (mass["operations"] == 0)]
    lines = []
    for source in ("latent", "answer"):
        cells = mean[(mean["source"] == source) & (mean["target"] == "latent")]
        if len(cells):
            numbers = [float(cells[name].mean()) for name in ("mean", "low", "high")]
            words = f"attention of {source} positions to latents, mean over blocks"
            lines.append(("G", words, *numbers, int(cells["n"].max()), NAN, "share"))
    return lines


def _signals(areas: pandas.DataFrame) -> list[tuple]:
    every = areas[areas["operations"] == 0]
    return [
        (
            *("H", f"AUC of {row['signal']} for a right answer ({row['wrong']} wrong)"),
            *(row["auc"], row["low"], row["high"], row["n"], 0.5, "AUC"),
        )
        for row in every.to_dict("records")
    ]


def in_words(value: float, unit: str) -> str:
    """A number as the page shows it."""
    if value is None or numpy.isnan(value):
        return ""
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.3g}"
