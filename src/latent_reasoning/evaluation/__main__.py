"""The stage evaluation: a model of an experiment, or any model folder.

    python -m latent_reasoning.evaluation --config FILE.. --model NAME --seed N --dataset D

evaluates a trained model of an experiment and writes
`results/{experiment}/evaluations/{model}/seed-{seed}/{dataset}/`.

    python -m latent_reasoning.evaluation --path MODEL_DIR --data FILE [--output DIR]

evaluates any Hugging Face or latent model folder on a file of rows with `question` and `answer`
(.jsonl, .json or .parquet; also GSM8K's own rows), and prints a summary.
"""

from __future__ import annotations

import argparse

from latent_reasoning.config import load
from latent_reasoning.dag.digests import check_digest, science
from latent_reasoning.dag.layout import Layout
from latent_reasoning.evaluation.evaluator import evaluate
from latent_reasoning.evaluation.folder import evaluate_folder, folder_options, read_free_rows
from latent_reasoning.evaluation.opened import open_model
from latent_reasoning.evaluation.records import summary_text, write_evaluation
from latent_reasoning.runtime.command import names_path, parser, run_stage
from latent_reasoning.runtime.tracking import open_tracker


def main(arguments: list[str] | None = None) -> None:
    """Evaluate a model of an experiment, or with `--path` any model folder."""
    if names_path(arguments):
        folder = folder_options(arguments, __doc__)
        rows = read_free_rows(folder.data, folder.limit, folder.number_rule, folder.on_bad_row)
        evaluate_folder(folder, rows)
    else:
        evaluate_model(parser(__doc__, model=True, dataset=True).parse_args(arguments))


def evaluate_model(options: argparse.Namespace) -> None:
    """Evaluate a model of an experiment; its files go where the workflow expects them."""
    experiment = load(options.config)
    digest = check_digest(experiment, "evaluation", options.digest, options.model)
    layout = Layout.of(experiment)
    opened = open_model(experiment, options.model, options.seed, options.dataset)
    evaluation = evaluate(
        opened.model, opened.tokenizer, opened.rows, opened.settings, opened.precision
    )
    summary = write_evaluation(
        layout.evaluation(options.model, options.seed, options.dataset),
        evaluation,
        science(experiment, "evaluation", options.model),
    )
    print(summary_text(f"{options.model}, seed {options.seed}, on {options.dataset}", summary))
    tracker = open_tracker(
        experiment,
        model=options.model,
        seed=options.seed,
        stage="evaluation",
        digest=digest,
        parent=layout.checkpoints(options.model, options.seed),
    )
    tracker.log_metrics({f"{options.dataset}/{k}": v for k, v in _numbers(summary).items()})
    tracker.close()


def _numbers(summary: dict) -> dict[str, float]:
    """The summary as flat metrics: the interval's two ends apart."""
    low, high = summary["accuracy_ci95"]
    plain = {name: value for name, value in summary.items() if name != "accuracy_ci95"}
    return plain | {"accuracy_ci95_low": low, "accuracy_ci95_high": high}


if __name__ == "__main__":
    run_stage(main)
