"""The tables: accuracy and length of every model, paired tests, length against difficulty.

`main` is written as .csv (shares are fractions), .md and .tex (per cent), all other tables as .csv.
All are pure functions of the evaluations of an experiment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas

from latent_reasoning.analysis.results import Results
from latent_reasoning.evaluation.metrics import grouped, paired_counts, pearson, wilson_interval
from latent_reasoning.runtime.files import atomic_file, write_text_atomically

PUBLISHED_DATASET = "test"
"""The published figures are of the paper's test split, so no other data set shows them."""

LENGTH_COLUMNS = (
    *("reasoning_tokens_mean", "reasoning_tokens_std", "reasoning_tokens_min"),
    *("reasoning_tokens_max", "badly_formatted", "cut_off"),
)
"""The values that `length_table` takes from an evaluation's summary."""


def write_tables(results: Results, folder: Path) -> None:
    """Write the main table and the `SUPPLEMENTS`."""
    write_main_table(results, folder, "main")
    for name, table in SUPPLEMENTS.items():
        write_csv(table(results), folder / f"{name}.csv")


def write_main_table(results: Results, folder: Path, name: str) -> None:
    """Write `main_table` of some models as `name`.csv, .md and .tex."""
    main = main_table(results)
    write_csv(main, folder / f"{name}.csv")
    write_text_atomically(folder / f"{name}.md", markdown(main))
    write_text_atomically(folder / f"{name}.tex", latex(main))


def main_table(results: Results) -> pandas.DataFrame:
    """One row per model and data set.

    `n` is the number of rows per seed. Accuracy and length are means over seeds, the interval is
    Wilson's on the pooled rows, `accuracy_seed_std` the sample standard deviation over seeds (empty
    for one seed). `tokens_vs_sft` is an RL model's relative change of length against the model it
    started from.
    """
    rows = [_main_row(results, m, d) for d in results.datasets for m in results.models]
    return pandas.DataFrame(rows)


def _main_row(results: Results, model: str, dataset: str) -> dict:
    summaries = [results.summary(model, seed, dataset) for seed in results.seeds]
    accuracies = pandas.Series([summary["accuracy"] for summary in summaries])
    correct = sum(summary["correct"] for summary in summaries)
    low, high = wilson_interval(correct, sum(summary["n"] for summary in summaries))
    tokens = mean_tokens(results, model, dataset)
    published = results.experiment.report.published.get(model)
    beside = published if dataset == PUBLISHED_DATASET else None
    return {
        "model": model,
        "dataset": dataset,
        "seeds": len(summaries),
        "n": summaries[0]["n"],
        "accuracy": accuracies.mean(),
        "accuracy_ci95_low": low,
        "accuracy_ci95_high": high,
        "reasoning_tokens": tokens,
        "tokens_vs_sft": _change_by_rl(results, model, dataset, tokens),
        "published_accuracy": beside.accuracy if beside else None,
        "published_tokens": beside.tokens if beside else None,
        "accuracy_seed_std": accuracies.std() if len(summaries) > 1 else None,
    }


def mean_tokens(results: Results, model: str, dataset: str) -> float:
    """Mean over seeds of the mean number of reasoning tokens."""
    means = [results.summary(model, s, dataset)["reasoning_tokens_mean"] for s in results.seeds]
    return sum(means) / len(means)


def _change_by_rl(results: Results, model: str, dataset: str, tokens: float) -> float | None:
    parents = {pair.model: pair.reference for pair in results.rl_pairs()}
    if model not in parents:
        return None
    before = mean_tokens(results, parents[model], dataset)
    return tokens / before - 1 if before else None


def paired_table(results: Results) -> pandas.DataFrame:
    """McNemar's exact test per seed: RL against its start, latent SFT against no reasoning."""
    rows = []
    for dataset in results.datasets:
        for pair in [*results.rl_pairs(), *results.no_reasoning_pairs()]:
            for seed in results.seeds:
                counts = paired_counts(
                    results.predictions(pair.model, seed, dataset),
                    results.predictions(pair.reference, seed, dataset),
                )
                which = {**asdict(pair), "dataset": dataset, "seed": seed}
                rows.append(which | asdict(counts) | {"p_mcnemar": counts.p_mcnemar})
    columns = ["model", "reference", "dataset", "seed", "n", "both_right", "only_model"]
    return pandas.DataFrame(rows, columns=[*columns, "only_reference", "p_mcnemar"])


def length_table(results: Results) -> pandas.DataFrame:
    """Length of the reasoning: one row per model, data set and seed.

    `pearson_r_steps` correlates the reasoning tokens with the number of gold steps; it is empty
    where the length is constant or the data have no steps.
    """
    rows = []
    for dataset in results.datasets:
        for model in results.models:
            for seed in results.seeds:
                predictions = results.predictions(model, seed, dataset)
                summary = results.summary(model, seed, dataset)
                row = {"model": model, "dataset": dataset, "seed": seed, "n": summary["n"]}
                row["pearson_r_steps"] = length_correlation(predictions)
                rows.append(row | {name: summary[name] for name in LENGTH_COLUMNS})
    return pandas.DataFrame(rows)


def length_correlation(predictions: pandas.DataFrame) -> float | None:
    """Pearson's r of reasoning tokens and gold steps over the rows of one evaluation."""
    return pearson(predictions["reasoning_tokens"], predictions["gold_steps"])


def steps_table(results: Results) -> pandas.DataFrame:
    """Accuracy and mean length by number of gold steps, pooled over seeds."""
    return _grouped_table(results, "gold_steps")


def tokens_table(results: Results) -> pandas.DataFrame:
    """Accuracy by number of reasoning tokens, pooled over seeds."""
    return _grouped_table(results, "reasoning_tokens").drop(columns="reasoning_tokens_mean")


def _grouped_table(results: Results, key: str) -> pandas.DataFrame:
    return _by_model(
        results,
        lambda model, dataset: grouped(
            results.pooled_predictions(model, dataset).dropna(subset=key), key
        ),
    )


def forced_table(results: Results) -> pandas.DataFrame:
    """Accuracy at every forced number of latent steps, pooled over seeds, with its interval."""

    def part_of(model: str, dataset: str) -> pandas.DataFrame:
        pooled = pandas.concat([results.forced(model, s, dataset) for s in results.seeds])
        part = pooled.groupby("latent_steps")[["n", "correct"]].sum().reset_index()
        part["accuracy"] = part["correct"] / part["n"]
        bounds = [wilson_interval(c, n) for c, n in zip(part["correct"], part["n"], strict=True)]
        part["accuracy_ci95_low"] = [low for low, _ in bounds]
        part["accuracy_ci95_high"] = [high for _, high in bounds]
        return part

    return _by_model(results, part_of)


def _by_model(
    results: Results, part_of: Callable[[str, str], pandas.DataFrame]
) -> pandas.DataFrame:
    """The parts of all models and data sets in one table, with columns `model` and `dataset`."""
    parts = []
    for dataset in results.datasets:
        for model in results.models:
            part = part_of(model, dataset)
            part.insert(0, "dataset", dataset)
            part.insert(0, "model", model)
            parts.append(part)
    return pandas.concat(parts, ignore_index=True)


SUPPLEMENTS: dict[str, Callable[[Results], pandas.DataFrame]] = {
    "paired": paired_table,
    "length": length_table,
    "by_steps": steps_table,
    "by_tokens": tokens_table,
    "forced": forced_table,
}
"""All tables but the main one, by file name."""


# --------------------------------------------------------------------------------- for readers


def readable(main: pandas.DataFrame) -> pandas.DataFrame:
    """The main table as text, in per cent, with empty cells for missing values.

    Columns without any value (published figures, seeds' spread) are left out.
    """
    several = (main["seeds"] > 1).any()
    columns = {
        "Model": main["model"],
        "Data": main["dataset"],
        "Rows": main["n"].map(lambda n: f"{n:,}"),
        "Seeds": main["seeds"].map(str),
        "Accuracy %": main["accuracy"].map(percent),
        "95 % interval": [
            f"{percent(low)} to {percent(high)}"
            for low, high in zip(main["accuracy_ci95_low"], main["accuracy_ci95_high"], strict=True)
        ],
        "Std over seeds": main["accuracy_seed_std"].map(percent),
        "Reasoning tokens": main["reasoning_tokens"].map(_number),
        "Tokens vs SFT %": main["tokens_vs_sft"].map(_signed_percent),
        "Paper: accuracy %": main["published_accuracy"].map(percent),
        "Paper: tokens": main["published_tokens"].map(_number),
    }
    if not several:
        del columns["Seeds"], columns["Std over seeds"]
    table = pandas.DataFrame({name: list(cells) for name, cells in columns.items()})
    return table.loc[:, [(table[name] != "").any() for name in table.columns]]


def percent(share: float | None) -> str:
    """A fraction as per cent with two decimals; empty for a missing value."""
    return "" if pandas.isna(share) else f"{100 * share:.2f}"


def _signed_percent(share: float | None) -> str:
    return "" if pandas.isna(share) else f"{100 * share:+.2f}"


def _number(value: float | None) -> str:
    return "" if pandas.isna(value) else f"{value:.2f}"


def _is_numeric(column: str) -> bool:
    return column not in ("Model", "Data", "95 % interval")


def markdown(main: pandas.DataFrame) -> str:
    """The main table in Markdown, with padded columns, so that its source is readable too."""
    table = readable(main)
    cells = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    numeric = [_is_numeric(name) for name in table.columns]

    def line(row: list[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    ends = [":" if right else "-" for right in numeric]
    rule = ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])]) + "\n"


def latex(main: pandas.DataFrame) -> str:
    """The main table as a LaTeX `tabular` (needs the package booktabs)."""
    table = readable(main)
    alignment = "".join("r" if _is_numeric(name) else "l" for name in table.columns)

    def line(row: list[str]) -> str:
        return " & ".join(cell.replace("%", r"\%").replace("_", r"\_") for cell in row) + r" \\"

    body = [line(row) for row in table.to_numpy().tolist()]
    head = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", line(list(table.columns))]
    return "\n".join([*head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write_csv(table: pandas.DataFrame, path: Path) -> None:
    """Write a table as comma-separated values, atomically."""
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False)
