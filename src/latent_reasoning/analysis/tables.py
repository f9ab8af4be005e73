"""The tables: accuracy and length of every model, paired tests, length against difficulty.

`main` is written as .csv (shares are fractions), .md and .tex (per cent), all other tables as .csv.
All are pure functions of the evaluations of an experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas

from latent_reasoning.analysis.compute import compute_table
from latent_reasoning.analysis.results import Pair, Results
from latent_reasoning.config import Published
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


def summaries(results: Results) -> pandas.DataFrame:
    """What `summary.json` holds of each evaluation, with columns `model`, `dataset`, `seed`."""
    rows = [
        {"model": model, "dataset": dataset, "seed": seed, **results.summary(model, seed, dataset)}
        for dataset in results.datasets
        for model in results.models
        for seed in results.seeds
    ]
    return pandas.DataFrame(rows)


def main_table(results: Results) -> pandas.DataFrame:
    """One row per model and data set.

    `n` is the number of rows per seed. Accuracy and length are means over seeds, the interval is
    Wilson's on the pooled rows, `accuracy_seed_std` the sample standard deviation over seeds (empty
    for one seed). `tokens_vs_sft` is an RL model's relative change of length against the model it
    started from.
    """
    groups = summaries(results).groupby(["dataset", "model"], sort=False)
    tokens = groups["reasoning_tokens_mean"].mean()
    starts = {pair.model: pair.reference for pair in results.rl_pairs()}
    rows = []
    for (dataset, model), own in groups:
        low, high = wilson_interval(own["correct"].sum(), own["n"].sum())
        before = tokens.get((dataset, starts.get(model)))
        published = Published()
        if dataset == PUBLISHED_DATASET:
            published = results.experiment.report.published.get(model, published)
        row = {
            "model": model,
            "dataset": dataset,
            "seeds": len(own),
            "n": own["n"].iloc[0],
            "accuracy": own["accuracy"].mean(),
            "accuracy_ci95_low": low,
            "accuracy_ci95_high": high,
            "reasoning_tokens": tokens[dataset, model],
            "tokens_vs_sft": tokens[dataset, model] / before - 1 if before else None,
            "published_accuracy": published.accuracy,
            "published_tokens": published.tokens,
            "accuracy_seed_std": own["accuracy"].std(),
        }
        rows.append(row)
    return pandas.DataFrame(rows)


def paired_table(results: Results) -> pandas.DataFrame:
    """McNemar's exact test per seed: RL against its start and its controls, latent SFT against no
    reasoning."""
    return paired_tests(
        results, [*results.rl_pairs(), *results.control_pairs(), *results.no_reasoning_pairs()]
    )


def paired_tests(results: Results, pairs: list[Pair]) -> pandas.DataFrame:
    """McNemar's exact test of each pair of models, on each data set and for each seed."""
    rows = []
    for dataset in results.datasets:
        for pair in pairs:
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
    table = summaries(results)
    which = table[["model", "seed", "dataset"]].itertuples(index=False)
    table["pearson_r_steps"] = [length_correlation(results.predictions(*one)) for one in which]
    return table[["model", "dataset", "seed", "n", "pearson_r_steps", *LENGTH_COLUMNS]]


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
    parts = {
        (model, dataset): grouped(
            results.pooled_predictions(model, dataset).dropna(subset=key), key
        )
        for dataset in results.datasets
        for model in results.models
    }
    table = pandas.concat(parts, names=["model", "dataset"])
    return table.reset_index(["model", "dataset"]).reset_index(drop=True)


def forced_table(results: Results) -> pandas.DataFrame:
    """Accuracy at every forced number of latent steps, pooled over seeds, with its interval."""
    parts = [
        results.forced(model, seed, dataset).assign(model=model, dataset=dataset)
        for dataset in results.datasets
        for model in results.models
        for seed in results.seeds
    ]
    groups = pandas.concat(parts).groupby(["model", "dataset", "latent_steps"], sort=False)
    table = groups[["n", "correct"]].sum().reset_index()
    table["accuracy"] = table["correct"] / table["n"]
    bounds = [wilson_interval(c, n) for c, n in zip(table["correct"], table["n"], strict=True)]
    table[["accuracy_ci95_low", "accuracy_ci95_high"]] = bounds
    return table


SUPPLEMENTS: dict[str, Callable[[Results], pandas.DataFrame]] = {
    "paired": paired_table,
    "length": length_table,
    "by_steps": steps_table,
    "by_tokens": tokens_table,
    "forced": forced_table,
    "compute": compute_table,
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
        "Reasoning tokens": main["reasoning_tokens"].map(number),
        "Tokens vs SFT %": main["tokens_vs_sft"].map(_signed_percent),
        "Paper: accuracy %": main["published_accuracy"].map(percent),
        "Paper: tokens": main["published_tokens"].map(number),
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


def number(value: float | None) -> str:
    """A number with two decimals; empty for a missing value."""
    return "" if pandas.isna(value) else f"{value:.2f}"


TEXTS = ("Model", "Data", "95 % interval")
"""The columns of `readable` that hold words; the others are numbers, aligned to the right."""


def markdown(main: pandas.DataFrame) -> str:
    """The main table in Markdown."""
    return markdown_of(readable(main), TEXTS)


def latex(main: pandas.DataFrame) -> str:
    """The main table as a LaTeX `tabular` (needs the package booktabs)."""
    return latex_of(readable(main), TEXTS)


def markdown_of(table: pandas.DataFrame, texts: Sequence[str]) -> str:
    """A table of text in Markdown, with padded columns, so that its source is readable too."""
    cells = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    numeric = [name not in texts for name in table.columns]

    def line(row: list[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    ends = [":" if right else "-" for right in numeric]
    rule = ["-" * (width - 1) + end for width, end in zip(widths, ends, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])]) + "\n"


def latex_of(table: pandas.DataFrame, texts: Sequence[str]) -> str:
    """A table of text as a LaTeX `tabular`; columns other than `texts` are aligned right."""
    alignment = "".join("l" if name in texts else "r" for name in table.columns)
    return table.to_latex(index=False, escape=True, column_format=alignment)


def write_csv(table: pandas.DataFrame, path: Path) -> None:
    """Write a table as comma-separated values, atomically."""
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False)
