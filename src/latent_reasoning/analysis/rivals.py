"""The rivals' tables: accuracy and cost of every method, paired tests, tuning trials.

The models are those of `report.rivals` (docs/rivals.md says what is fair). Costs are counted in
ways of their own beside the milliseconds, for a table may not depend on the machine:

- `latents` of an answer, and its `reasoning_tokens` (n + 2, or the tokens of a text);
- `forwards` between the question and the answer, one after another: a text's tokens, or n + 1, as
  START is read with the question; 1 for `pause`, whose latent inputs are known beforehand;
- `reasoning_flop` of an answer, `training_flop` of the model and of all it started from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pandas

from latent_reasoning.analysis.compute import reasoning_cost
from latent_reasoning.analysis.results import MissingResultError, Pair, Results
from latent_reasoning.analysis.tables import (
    PUBLISHED_DATASET,
    main_table,
    number,
    paired_tests,
    percent,
)
from latent_reasoning.analysis.training_cost import training_costs
from latent_reasoning.config import ModelEntry
from latent_reasoning.dag.cost import size_of
from latent_reasoning.dag.planning import rival_models, shown
from latent_reasoning.evaluation.metrics import wilson_interval

TRIALS_DATASET = "validation"
"""What tuning trials are judged by; the test rows select nothing."""


def rivals_of(results: Results) -> Results:
    """The same experiment with the models of `report.rivals`."""
    return replace(results, models=rival_models(results.experiment))


def rivals_table(results: Results) -> pandas.DataFrame:
    """One row per model and data set, in the columns of `rivals.csv`.

    Means are over seeds and rows; the interval is Wilson's on the pooled rows. Milliseconds, FLOPs
    and examples of training are of the first seed. `trials` counts the trials of the method.
    """
    results = rivals_of(results)
    section, size = results.experiment.report.rivals, size_of(results.experiment)
    costs, rows = training_costs(results), []
    for row in main_table(results).to_dict("records"):
        model = row["model"]
        predictions = results.pooled_predictions(model, row["dataset"])
        known = section.published.get(model, {}) if row["dataset"] == PUBLISHED_DATASET else {}
        rows.append(
            {key: row[key] for key in MEASURED}
            | reasoning_cost(results, size, model, predictions)
            | _milliseconds(results, model)
            | {
                "examples": costs[model].examples,
                "training_flop": costs[model].operations,
                "trained_parameters": costs[model].trained_parameters,
                "trials": len(section.trials.get(method_of(results, model), [])),
                "published": "; ".join(f"{percent(value)} ({by})" for by, value in known.items()),
            }
        )
    return pandas.DataFrame(rows)


MEASURED = (
    *("model", "dataset", "seeds", "n", "accuracy", "accuracy_ci95_low", "accuracy_ci95_high"),
    "accuracy_seed_std",
)


def method_of(results: Results, model: str) -> str:
    """The method that a model is a trial of, or the model's own name."""
    for method, trials in results.experiment.report.rivals.trials.items():
        if model in trials:
            return method
    return model


def _milliseconds(results: Results, model: str) -> dict[str, float]:
    path = results.layout.timing(model)
    if not path.is_file():
        raise MissingResultError(f"no {path}; make it with: snakemake {shown(path)}")
    measured = json.loads(path.read_text("utf-8"))
    return {key: measured[key] for key in ("milliseconds_alone", "milliseconds_in_batches")}


def rivals_paired(results: Results) -> pandas.DataFrame:
    """McNemar's exact test of each model against each of the references, per seed."""
    results = rivals_of(results)
    pairs = [
        Pair(model, reference)
        for reference in results.experiment.report.rivals.references
        for model in results.experiment.report.rivals.models
        if model != reference
    ]
    return paired_tests(results, pairs)


# -------------------------------------------------------------------------------------- tuning


def tuning_table(results: Results) -> pandas.DataFrame:
    """One row per trial, also of those that failed: first seed, validation rows.

    `settings` are the trial's keys that differ from the method's first trial. `best` marks the most
    accurate trial, of equally accurate ones the one that reasons less; `in_table` those whose model
    stands in the table.
    """
    section, seed = results.experiment.report.rivals, results.seeds[0]
    rows: list[dict[str, Any]] = []
    for method, trials in section.trials.items():
        first = results.experiment.models[trials[0]]
        own: list[dict[str, Any]] = []
        for trial in trials:
            row: dict[str, Any] = {"method": method, "trial": trial}
            row["settings"] = settings_beside(first, results.experiment.models[trial])
            row |= {"seed": seed, "failed": section.failed.get(trial, "")}
            if not row["failed"]:
                row |= _validated(results.summary(trial, seed, TRIALS_DATASET))
            own.append(row | {"in_table": trial in section.models})
        done = [row for row in own if not row["failed"]]
        best = max(done, key=lambda row: (row["accuracy"], -row["reasoning_tokens"]), default=None)
        rows += [row | {"best": row is best} for row in own]
    return pandas.DataFrame(rows, columns=TUNING_COLUMNS)


TUNING_TEXTS = ("Method", "Trial", "Settings beside the first")
TUNING_COLUMNS = [
    *("method", "trial", "settings", "seed", "n", "accuracy", "accuracy_ci95_low"),
    *("accuracy_ci95_high", "reasoning_tokens", "badly_formatted", "failed", "best", "in_table"),
]


def _validated(summary: dict) -> dict[str, Any]:
    low, high = wilson_interval(summary["correct"], summary["n"])
    return {
        "n": summary["n"],
        "accuracy": summary["accuracy"],
        "accuracy_ci95_low": low,
        "accuracy_ci95_high": high,
        "reasoning_tokens": summary["reasoning_tokens_mean"],
        "badly_formatted": summary["badly_formatted"],
    }


def settings_beside(first: ModelEntry, trial: ModelEntry) -> str:
    """The keys of a trial that differ from the first one's, as `key: value, ..`."""
    before, now = (_flat(entry.model_dump(mode="json", by_alias=True)) for entry in (first, trial))
    return ", ".join(
        f"{key}: {json.dumps(value)}"
        for key, value in now.items()
        if key not in before or before[key] != value
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# --------------------------------------------------------------------------------- for readers

RIVALS_TEXTS = ("Model", "Data", "95 % interval", "Published %, by whom")


def readable_rivals(table: pandas.DataFrame) -> list[pandas.DataFrame]:
    """The rivals' table as text, in three narrow ones: accuracy and length, costs, what was
    published. Shares are in per cent, operations in powers of ten."""
    bounds = zip(table["accuracy_ci95_low"], table["accuracy_ci95_high"], strict=True)
    which = {"Model": table["model"], "Data": table["dataset"]}
    results = {
        "Seeds": table["seeds"].map(str),
        "Rows": table["n"].map("{:,}".format),
        "Accuracy %": table["accuracy"].map(percent),
        "95 % interval": [f"{percent(low)} to {percent(high)}" for low, high in bounds],
        "Std over seeds": table["accuracy_seed_std"].map(percent),
        "Latents": table["latents"].map(number),
        "Reasoning tokens": table["reasoning_tokens"].map(number),
        "Trials": table["trials"].map(str),
    }
    costs = {
        "Forwards": table["forwards"].map(number),
        "FLOPs a row": table["reasoning_flop"].map(_power),
        "ms a row, alone": table["milliseconds_alone"].map(number),
        "ms a row, in batches": table["milliseconds_in_batches"].map(number),
        "Examples": table["examples"].map("{:,}".format),
        "Training FLOPs": table["training_flop"].map(_power),
        "Trained weights": table["trained_parameters"].map("{:,}".format),
    }
    published = {"Published %, by whom": table["published"]}
    frames = []
    for columns in (results, costs, published):
        frame = pandas.DataFrame({name: list(c) for name, c in (which | columns).items()})
        if table["dataset"].nunique() == 1:
            del frame["Data"]
        frames.append(frame.loc[:, [(frame[name] != "").any() for name in frame.columns]])
    frames[-1] = frames[-1][(table["published"] != "").to_numpy()]
    return [frame for frame in frames if not frame.empty]


def _power(value: float) -> str:
    if pandas.isna(value):
        return ""
    return "0" if value == 0 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def readable_tuning(table: pandas.DataFrame) -> pandas.DataFrame:
    """The tuning table as text; a trial that failed says why in place of its accuracy."""
    marks = {True: "yes", False: ""}
    return pandas.DataFrame(
        {
            "Method": table["method"],
            "Trial": table["trial"],
            "Settings beside the first": table["settings"],
            "Accuracy %": [
                (failed and f"failed: {failed}") or percent(accuracy)
                for failed, accuracy in zip(table["failed"], table["accuracy"], strict=True)
            ],
            "Reasoning tokens": table["reasoning_tokens"].map(number),
            "Best": table["best"].map(marks),
            "In the table": table["in_table"].map(marks),
        }
    )
