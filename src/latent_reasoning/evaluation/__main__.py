"""The stage evaluation: a model of an experiment, or any model folder.

    python -m latent_reasoning.evaluation --config FILE.. --model NAME --seed N --dataset D

evaluates a trained model of an experiment and writes
`results/{experiment}/evaluations/{model}/seed-{seed}/{dataset}/`.

    python -m latent_reasoning.evaluation --path MODEL_DIR --data FILE [--output DIR]

evaluates any Hugging Face or latent model folder on a file of JSON lines with `question` and
`answer`, and prints a summary.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from latent_reasoning.config import Evaluation as EvaluationSection
from latent_reasoning.config import Runtime, load
from latent_reasoning.dag.digests import check_digest, science
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.answers import find_number
from latent_reasoning.data.rows import DataError, Row, json_line_records, parse_row, read_rows
from latent_reasoning.data.sequences import apply_special_token_policy
from latent_reasoning.evaluation.evaluator import EvaluationSettings, evaluate
from latent_reasoning.evaluation.metrics import summarise
from latent_reasoning.evaluation.records import write_evaluation
from latent_reasoning.model.card import prompt_prefix
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.runtime.command import parser, run_stage
from latent_reasoning.runtime.device import resolve_device, resolve_precision, set_threads
from latent_reasoning.runtime.gpus import take_gpus
from latent_reasoning.runtime.tracking import open_tracker


def main(argv: list[str] | None = None) -> None:
    """Evaluate a model of an experiment, or with `--path` any model folder."""
    arguments = sys.argv[1:] if argv is None else argv
    if any(argument.split("=")[0] == "--path" for argument in arguments):
        evaluate_folder(_free_options(arguments))
    else:
        evaluate_model(parser(__doc__, model=True, dataset=True).parse_args(arguments))


def evaluate_model(options: argparse.Namespace) -> None:
    """Evaluate a model of an experiment; its files go where the workflow expects them."""
    experiment = load(options.config)
    digest = check_digest(experiment, "evaluation", options.digest, options.model)
    layout, section, runtime = Layout.of(experiment), experiment.evaluation, experiment.runtime
    set_threads(runtime.threads)
    take_gpus(runtime.device)
    device = resolve_device(runtime.device)
    folder = layout.model(options.model, options.seed)
    tokenizer = load_tokenizer(folder)
    rows, _ = apply_special_token_policy(
        read_rows(layout.data(options.dataset)), tokenizer, experiment.data.special_token_text
    )
    settings = EvaluationSettings(
        prefix=experiment.data.prompt.evaluation,
        max_new_tokens=section.max_new_tokens,
        batch_size=runtime.evaluation_batch_size,
        forced_steps=getattr(experiment.models[options.model], "forced_steps", None),
        max_forced_steps=section.max_forced_steps,
        forced_rows=section.forced_rows,
        precision=resolve_precision(runtime.precision, device),
    )
    evaluation = evaluate(load_model(folder, device.type), tokenizer, rows, settings)
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


def evaluate_folder(options: argparse.Namespace) -> None:
    """Evaluate any model folder on any file of rows."""
    take_gpus(options.device)
    device = resolve_device(options.device)
    tokenizer = load_tokenizer(options.path)
    rows = read_free_rows(options.data, options.limit)
    rows, _ = apply_special_token_policy(rows, tokenizer, "error")
    prefix = options.prompt_prefix
    settings = EvaluationSettings(
        prefix=prompt_prefix(options.path) if prefix is None else prefix,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        forced_steps=options.forced_steps,
        max_forced_steps=options.max_forced_steps,
        precision=resolve_precision(options.precision, device),
    )
    evaluation = evaluate(load_model(options.path, device.type), tokenizer, rows, settings)
    if options.output is None:
        summary = summarise(evaluation.frame(), evaluation.seconds)
    else:
        summary = write_evaluation(options.output, evaluation)
    print(summary_text(f"{options.path} on {options.data}", summary))
    for point in evaluation.forced:
        print(f"  forced to {point.latent_steps} latent steps: {100 * point.accuracy:.2f} %")


def read_free_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Rows of any file of JSON lines; `{file name}-{line from 0}` is a row's id.

    Raises `DataError` naming file and line, for an answer without a number too: nothing could be
    right about it.
    """
    rows: list[Row] = []
    for number, record in json_line_records(path):
        if limit is not None and len(rows) == limit:
            break
        where = f"{path}, line {number + 1}"
        if isinstance(record, DataError):
            raise record
        row = parse_row(record, f"{path.stem}-{number}", where)
        if find_number(row.answer) is None:
            raise DataError(f"{where}: the answer {row.answer!r} holds no number to compare with")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def summary_text(title: str, summary: dict) -> str:
    """The summary of an evaluation for a reader, in per cent."""
    low, high = summary["accuracy_ci95"]
    return "\n".join(
        (
            title,
            f"  accuracy          {100 * summary['accuracy']:.2f} % "
            f"({summary['correct']} of {summary['n']}; "
            f"95 % interval {100 * low:.2f} to {100 * high:.2f})",
            f"  reasoning tokens  {summary['reasoning_tokens_mean']:.2f} "
            f"(std {summary['reasoning_tokens_std']:.2f}, "
            f"{summary['reasoning_tokens_min']} to {summary['reasoning_tokens_max']})",
            f"  badly formatted   {summary['badly_formatted']}",
            f"  cut off           {summary['cut_off']}",
            f"  seconds           {summary['seconds']:.1f}",
        )
    )


def _numbers(summary: dict) -> dict[str, float]:
    """The summary as flat metrics: the interval's two ends apart."""
    low, high = summary["accuracy_ci95"]
    plain = {name: value for name, value in summary.items() if name != "accuracy_ci95"}
    return plain | {"accuracy_ci95_low": low, "accuracy_ci95_high": high}


def _free_options(arguments: list[str]) -> argparse.Namespace:
    section, runtime = EvaluationSection(), Runtime()
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command.add_argument
    add("--path", type=Path, required=True, metavar="MODEL_DIR", help="model folder")
    add("--data", type=Path, required=True, metavar="FILE", help="JSON lines: question, answer")
    add("--output", type=Path, metavar="DIR", help="write summary, predictions and tables here")
    add("--limit", type=_positive, help="first rows only")
    add("--forced-steps", type=_count, help="make every row take this many latent steps")
    add("--max-forced-steps", type=_count, help="measure accuracy at every forced n up to this")
    add("--prompt-prefix", help="text before the question (default: what the card says)")
    add("--max-new-tokens", type=_positive, default=section.max_new_tokens)
    add("--batch-size", type=_positive, default=runtime.evaluation_batch_size)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    return command.parse_args(arguments)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


if __name__ == "__main__":
    run_stage(main)
