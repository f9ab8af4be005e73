"""What an answer costs: operations and milliseconds a row, beside its accuracy.

Question and answer are the same for all models, so only the reasoning's operations are counted, two
for each weight that multiplies a token, as in `dag.cost`. A text token passes the blocks and the
output matrix. A latent token passes the blocks; each latent step also passes the recurrent filter.
Milliseconds are those of the whole row, in the evaluation's batches, on the machine that ran it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas
from matplotlib.figure import Figure

from latent_reasoning.analysis.results import Results
from latent_reasoning.analysis.style import legend_below, looks, page, share_axis
from latent_reasoning.config import (
    DecodeModel,
    LatentSftModel,
    Model,
    RivalPolicyModel,
    RlModel,
    TeacherForcedModel,
)
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
            n, cost = summaries[0]["n"], reasoning_cost(results, size, model, predictions)
            rows.append(
                {
                    "model": model,
                    "dataset": dataset,
                    "seeds": len(summaries),
                    "n": n,
                    "accuracy": predictions["correct"].mean(),
                    "reasoning_tokens": cost["reasoning_tokens"],
                    "reasoning_megaflop": cost["reasoning_flop"] / 1e6,
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


def reasoning_cost(
    results: Results, size: ModelSize, model: str, predictions: pandas.DataFrame
) -> dict[str, float]:
    """Mean `latents, reasoning_tokens, forwards, reasoning_flop` of a row, as `analysis.rivals` has
    them."""
    latent, steps = is_latent(results, model, predictions), predictions["latent_steps"].mean()
    written = tokens_written(predictions)
    at_once = latent and model_settings(results, model).recurrent_filter == "pause"
    weights = reasoning_weights(results, size, model, latent=latent)
    return {
        "latents": steps,
        "reasoning_tokens": predictions["reasoning_tokens"].mean(),
        "forwards": 1.0 if at_once else written - latent,
        "reasoning_flop": reasoning_operations(written, steps, weights),
    }


def is_latent(results: Results, model: str, predictions: pandas.DataFrame) -> bool:
    """Whether a model reasons in latent steps, even where no answer took one."""
    entry = results.experiment.models[model]
    by_entry = isinstance(entry, LatentSftModel | RlModel | TeacherForcedModel)
    by_entry |= isinstance(entry, RivalPolicyModel) and entry.method != "hrpo"
    by_entry |= isinstance(entry, DecodeModel) and entry.method == "colar"
    return by_entry or bool(predictions["latent_steps"].any())


def tokens_written(predictions: pandas.DataFrame) -> float:
    """Mean reasoning tokens of a row, those of a search included: its other texts count as being as
    long as the one that it found."""
    tokens = predictions["reasoning_tokens"]
    if "searched" in predictions:
        tokens = tokens * (1 + predictions["searched"].fillna(0))
    return tokens.mean()


@dataclass(frozen=True)
class ReasoningWeights:
    """Weights that multiply each reasoning token, and beside them each latent step."""

    token: int
    step: int = 0


def reasoning_operations(tokens: float, steps: float, weights: ReasoningWeights) -> float:
    """Operations of `tokens` reasoning tokens, of which `steps` are latent steps."""
    return 2 * (tokens * weights.token + steps * weights.step)


def reasoning_weights(
    results: Results, size: ModelSize, model: str, *, latent: bool
) -> ReasoningWeights:
    """The weights of a model's reasoning: `latent`, or in text, whose tokens pass the output
    matrix, and HRPO's also its gate and the mixture of all embeddings."""
    if latent:
        settings = model_settings(results, model)
        return ReasoningWeights(size.block_weights, filter_weights(size, settings))
    output = size.hidden * size.vocabulary
    entry = results.experiment.models[model]
    gated = entry.stage == "policy" and entry.method == "hrpo"
    gate = output + 2 * size.hidden**2 if gated else 0
    return ReasoningWeights(size.block_weights + output + gate)


def filter_weights(size: ModelSize, settings: Model) -> int:
    """The weights that make the input of a latent step out of a hidden state, and those of the stop
    decision where the language-model head takes it.

    Raises `KeyError` for a filter that is not counted here.
    """
    square, width = size.hidden**2, settings.filter_width or size.hidden
    output = size.hidden * size.vocabulary
    weights = {
        "none": 0,
        "pause": 0,
        "MLP": 2 * square,
        "projection": 2 * size.hidden * width,
        "linear": square,
        "linear_ln": square,
        "linear_ECF": square,
        "SRE": 2 * output,  # logits, and the mixture of all embeddings
        "mixture": output + size.hidden * (settings.mixture_size or size.vocabulary),
        "attention": 4 * square,  # query, key, value, output
        "gaussian": 2 * size.hidden * width + width**2,  # the mean alone
    }
    deciding = output if settings.stop_rule == "marker" else 0
    return weights[settings.recurrent_filter] + deciding


def model_settings(results: Results, model: str) -> Model:
    """The section `model` of a latent model: its own, or that of the nearest ancestor with one."""
    experiment = results.experiment
    while model != "base":
        own = getattr(experiment.models[model], "model", None)
        if own is not None:
            return own
        model = results.parent(model)
    return experiment.model
