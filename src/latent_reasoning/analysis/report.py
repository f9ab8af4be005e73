"""The report page: claims and verdicts, what was run, tables, figures, departures, environment.

`report.html` is a single file: the figures are inside it, and nothing is fetched. It is written for
a reader who has not seen the paper. The captions come from `workflow/report/`.
"""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
import pandas

from latent_reasoning.analysis.claims import claims_of, p_text
from latent_reasoning.analysis.environment import environment, job_times
from latent_reasoning.analysis.figures import FIGURES
from latent_reasoning.analysis.results import MissingResultError, Results
from latent_reasoning.analysis.rival_figures import RIVAL_FIGURES
from latent_reasoning.analysis.rivals import (
    RIVALS_TEXTS,
    TUNING_TEXTS,
    readable_rivals,
    readable_tuning,
    rivals_paired,
    rivals_table,
    tuning_table,
)
from latent_reasoning.analysis.tables import (
    length_table,
    main_table,
    paired_table,
    percent,
    readable,
)
from latent_reasoning.config import (
    PROJECT_ROOT,
    Data,
    DecodeModel,
    Experiment,
    ImportModel,
    LatentSteps,
    ModelEntry,
)
from latent_reasoning.data.sequences import latent_step_count
from latent_reasoning.runtime.files import write_text_atomically

CAPTIONS = PROJECT_ROOT / "workflow" / "report"
TITLES = {
    "accuracy_vs_tokens": "Accuracy and length",
    "length_distribution": "How long the answers took",
    "length_by_steps": "Length and difficulty",
    "accuracy_forced": "Are the latent steps needed?",
    "accuracy_vs_compute": "Accuracy and compute",
    "training_curves": "Training",
    "rivals": "Accuracy against latents and operations",
    "rivals_curves": "Longer and shorter",
}


def templates(folder: Path) -> jinja2.Environment:
    """The page templates of a folder; a name that is not given to one is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_report(results: Results, figures: Path, path: Path) -> None:
    """Write the page of an experiment; `figures` is the folder of its figures."""
    template = templates(Path(__file__).parent).get_template("report.html.jinja")
    write_text_atomically(path, template.render(**content(results, figures)))


def content(results: Results, figures: Path) -> dict:
    """Everything the template shows."""
    experiment = results.experiment
    claims = claims_of(results)
    times = job_times(results.layout)
    return {
        "title": experiment.report.title,
        "experiment": experiment,
        "claims": claims,
        "reached": sum(claim.reached is True for claim in claims),
        "headlines": _headlines(results),
        "data": describe_data(experiment.data),
        "splits": _split_rows(results.data_summary()),
        "base": describe_base(experiment),
        "models": [_model_row(experiment, name) for name in results.models],
        "main": readable(main_table(results)),
        "main_caption": caption("main_table"),
        "paired": _readable_paired(paired_table(results)),
        "paired_caption": caption("paired_table"),
        "length": _readable_length(length_table(results)),
        "length_caption": caption("length_table"),
        "figures": [_figure(figures, name) for name in FIGURES],
        "rivals": rivals_content(results, figures) if experiment.report.rivals.models else None,
        "environment": environment(experiment),
        "times": times,
        "total_minutes": times["seconds"].sum() / 60,
    }


def rivals_content(results: Results, figures: Path) -> dict:
    """What the template's section on the rivals shows."""
    return {
        "tables": readable_rivals(rivals_table(results)),
        "texts": RIVALS_TEXTS,
        "caption": caption("rivals_table"),
        "figures": [_figure(figures, name) for name in RIVAL_FIGURES],
        "paired": _readable_paired(rivals_paired(results)),
        "paired_caption": caption("rivals_paired_table"),
        "tuning": readable_tuning(tuning_table(results)),
        "tuning_texts": TUNING_TEXTS,
        "tuning_caption": caption("rivals_tuning_table"),
    }


def caption(name: str) -> str:
    """The caption of a table or figure, as plain text."""
    text = (CAPTIONS / f"{name}.rst").read_text(encoding="utf-8")
    return " ".join(text.split())


def _figure(folder: Path, name: str) -> dict[str, str]:
    path = folder / f"{name}.svg"
    if not path.is_file():
        raise MissingResultError(
            f"no figure {path}; make it with: snakemake figures, or "
            "python -m latent_reasoning.analysis figures --config FILE"
        )
    encoded = base64.b64encode(path.read_bytes()).decode("ascii")
    source = f"data:image/svg+xml;base64,{encoded}"
    return {"name": name, "title": TITLES[name], "source": source, "caption": caption(name)}


# ------------------------------------------------------------------------------------- in words


def _headlines(results: Results) -> list[str]:
    """A sentence for each RL model, compared with its start, and each model without reasoning."""
    dataset = results.datasets[0]
    main = main_table(results).query("dataset == @dataset").set_index("model")
    sentences = []
    for pair in results.rl_pairs():
        after, before = main.loc[pair.model], main.loc[pair.reference]
        sentences.append(
            f"{pair.model} answers {percent(after['accuracy'])} % of the {after['n']:,} rows of "
            f"{dataset} correctly and spends {after['reasoning_tokens']:.2f} reasoning tokens on "
            f"one; {pair.reference}, from which it started, {percent(before['accuracy'])} % with "
            f"{before['reasoning_tokens']:.2f}."
        )
    for model in results.no_reasoning_models():
        accuracy = percent(main.loc[model, "accuracy"])
        sentences.append(f"{model}, trained to answer at once, reaches {accuracy} %.")
    return sentences


def describe_data(data: Data) -> str:
    """Where the rows come from, in a sentence."""
    if data.source == "hub":
        return f"The data set {data.hub_id} of the Hugging Face hub."
    if data.source == "local":
        return "Rows of a local folder, in the form of GSM8K-Aug: question, steps, answer."
    generated = data.generated
    references = (
        f", of which from the third on {generated.references:.0%} take an earlier result"
        if generated.references
        else ""
    )
    return (
        f"Word problems made by the project, in the form of GSM8K-Aug: chains of 1 to "
        f"{generated.max_steps} operations on a dial of {generated.modulus} positions{references} "
        f"({generated.train:,} rows for training, {generated.validation:,} for validation, "
        f"{generated.test:,} for testing)."
    )


def _split_rows(summary: dict) -> list[dict[str, str]]:
    """The number of rows of each split, and how many were dropped why, in words."""
    return [
        {
            "name": name,
            "rows": f"{split['rows']:,}",
            "dropped": ", ".join(
                f"{count:,} {reason.replace('_', ' ')}"
                for reason, count in split["dropped"].items()
                if count
            ),
        }
        for name, split in summary["splits"].items()
    ]


FAMILIES = {"llama": "Llama", "gpt2": "GPT-2"}


def describe_base(experiment: Experiment) -> str:
    """The base model, in a sentence."""
    base, shape = experiment.base, experiment.base.architecture
    if base.source == "scratch":
        return (
            f"A tiny {FAMILIES[shape.family]} (width {shape.hidden_size}, "
            f"{shape.num_hidden_layers} blocks, {shape.num_attention_heads} heads), trained from "
            f"scratch on generated text for at most {base.training.steps:,} steps."
        )
    if base.source == "hub":
        return f"{base.hub_id} of the Hugging Face hub."
    return f"Pretrained weights from {Path(base.path).name} ({base.source})."


def describe_model(entry: ModelEntry) -> str:
    """How a model is trained, in a few words."""
    if entry.stage == "sft":
        return "SFT: steps in text" if entry.form == "cot" else "SFT: the answer at once"
    if entry.stage == "latent_sft":
        return f"latent SFT: {describe_steps(entry.latent_steps)}"
    if entry.stage == "rl":
        return f"RL: {entry.group_size} samples a question, shorter is better where all are right"
    if entry.stage == "import":
        return "brought in as it is"
    return f"{entry.method.replace('_', ' ')} (docs/rivals.md)"


def describe_steps(steps: LatentSteps) -> str:
    """The number of latent steps of a training example, in words."""
    if steps.factor == 0 or (steps.min is not None and steps.min == steps.max):
        return f"{latent_step_count(0, steps)} latent steps"
    growth = f"{steps.bias} latent steps + {steps.factor} a reasoning step"
    if steps.min is not None and steps.min > steps.bias + steps.factor:
        growth += f", at least {steps.min}"
    return growth if steps.max is None else f"{growth}, at most {steps.max}"


def _model_row(experiment: Experiment, name: str) -> dict[str, str]:
    entry = experiment.models[name]
    row = {"name": name, "what": describe_model(entry), "start": entry.start or "outside"}
    if isinstance(entry, ImportModel | DecodeModel):
        return row | {"steps": "", "batch": "", "rate": "", "weights": ""}
    training = entry.training
    return row | {
        "steps": f"{training.steps:,}",
        "batch": f"{training.batch_size:,}",
        "rate": f"{training.learning_rate:g}",
        "weights": f"LoRA, rank {entry.lora.r}" if entry.lora else "all",
    }


def _readable_paired(paired: pandas.DataFrame) -> pandas.DataFrame:
    return pandas.DataFrame(
        {
            "Model": paired["model"],
            "Compared with": paired["reference"],
            "Data": paired["dataset"],
            "Seed": paired["seed"].map(str),
            "Both right": paired["both_right"].map(str),
            "Only the model": paired["only_model"].map(str),
            "Only the other": paired["only_reference"].map(str),
            "McNemar's p": paired["p_mcnemar"].map(p_text),
        }
    )


def _readable_length(length: pandas.DataFrame) -> pandas.DataFrame:
    correlation = [
        "" if pandas.isna(r) else f"{r:.3f}" for r in length["pearson_r_steps"].astype(float)
    ]
    ranges = zip(length["reasoning_tokens_min"], length["reasoning_tokens_max"], strict=True)
    return pandas.DataFrame(
        {
            "Model": length["model"],
            "Data": length["dataset"],
            "Seed": length["seed"].map(str),
            "r with steps": correlation,
            "Mean": length["reasoning_tokens_mean"].map("{:.2f}".format),
            "Std": length["reasoning_tokens_std"].map("{:.2f}".format),
            "Range": [f"{low} to {high}" for low, high in ranges],
            "Badly formatted": length["badly_formatted"].map(str),
            "Cut off": length["cut_off"].map(str),
        }
    )
