"""What an answer costs: operations and milliseconds a row, beside its accuracy.

Question and answer are the same for all models, so only the reasoning's operations are counted, two
for each weight that multiplies a token, as in `dag.cost`. A text token passes the blocks and the
output matrix. A latent token passes the blocks; each latent step also passes the recurrent filter.
Milliseconds are those of the whole row, in the evaluation's batches, on the machine that ran it.
"""

from __future__ import annotations

import pandas
from matplotlib.figure import Figure

from latent_reasoning.analysis.results import Results
from latent_reasoning.analysis.style import legend_below, looks, page, share_axis
from latent_reasoning.dag.cost import ModelSize, size_of


def compute_table(results: Results) -> pandas.DataFrame:
    """One row per model and data set; all but `seeds` and `n` are means over seeds.

    `reasoning_megaflop` and `milliseconds` are a row's; `accuracy` is a share.
    """
    size = size_of(results.experiment)
    rows = []
    for dataset in results.datasets:
        for model in results.models:
            predictions = results.pooled_predictions(model, dataset)
            summaries = [results.summary(model, seed, dataset) for seed in results.seeds]
            n = summaries[0]["n"]
            latent = predictions["latent_steps"].any()
            operations = reasoning_operations(
                size,
                tokens=predictions["reasoning_tokens"].mean(),
                steps=predictions["latent_steps"].mean(),
                recurrent_filter=filter_of(results, model) if latent else None,
            )
            rows.append(
                {
                    "model": model,
                    "dataset": dataset,
                    "seeds": len(summaries),
                    "n": n,
                    "accuracy": predictions["correct"].mean(),
                    "reasoning_tokens": predictions["reasoning_tokens"].mean(),
                    "reasoning_megaflop": operations / 1e6,
                    "milliseconds": 1e3 * sum(s["seconds"] / n for s in summaries) / len(summaries),
                }
            )
    return pandas.DataFrame(rows)


def compute_figure(results: Results) -> Figure:
    """Accuracy against the reasoning's operations and the milliseconds of a row."""
    dataset, look = results.datasets[0], looks(results)
    table = compute_table(results)
    table = table[table["dataset"] == dataset]
    figure, grid = page(1, 2, 3.4, sharey=True)
    titles = {
        "reasoning_megaflop": "millions of operations of a row's reasoning",
        "milliseconds": "milliseconds a row",
    }
    for axes, (column, title) in zip(grid[0], titles.items(), strict=True):
        for row in table.to_dict("records"):
            point = look[row["model"]].point
            axes.plot(row[column], row["accuracy"], linestyle="none", label=row["model"], **point)
        axes.set_xlabel(title)
        axes.set_xlim(left=-0.04 * max(1e-3, table[column].max()))
    grid[0][0].set_ylabel(f"accuracy on {dataset}")
    share_axis(grid[0][0])
    legend_below(figure, grid[0][0], columns=3)
    return figure


def reasoning_operations(
    size: ModelSize, tokens: float, steps: float, recurrent_filter: str | None
) -> float:
    """Operations of `tokens` reasoning tokens, of which `steps` are latent steps.

    `recurrent_filter` is a value of `model.recurrent_filter`, None for a model that reasons in
    text.
    """
    output = size.hidden * size.vocabulary
    if recurrent_filter is None:
        return 2 * tokens * (size.block_weights + output)
    square = size.hidden**2
    of_filter = {"none": 0, "pause": 0, "MLP": 2 * square, "SRE": 2 * output}
    weights = of_filter.get(recurrent_filter, square)
    return 2 * (tokens * size.block_weights + steps * weights)


def filter_of(results: Results, model: str) -> str:
    """The filter of a latent model: that of the nearest ancestor that sets one, or itself."""
    experiment = results.experiment
    while model != "base":
        own = getattr(experiment.models[model], "model", None)
        if own is not None:
            return own.recurrent_filter
        model = results.parent(model)
    return experiment.model.recurrent_filter
