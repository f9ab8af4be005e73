"""Evaluate any Hugging Face or latent model folder on any file of rows.

`ask` and `python -m latent_reasoning.evaluation --path` read a folder in the same way.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Evaluation as EvaluationSection
from latent_reasoning.config import Runtime
from latent_reasoning.data.answers import find_number
from latent_reasoning.data.rows import DataError, Row, json_line_records, parse_row
from latent_reasoning.data.sequences import apply_special_token_policy
from latent_reasoning.evaluation.evaluator import EvaluationSettings, evaluate
from latent_reasoning.evaluation.metrics import summarise
from latent_reasoning.evaluation.records import summary_text, write_evaluation
from latent_reasoning.model.card import prompt_prefix
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.self_check import check_reading
from latent_reasoning.runtime.device import resolve_device, resolve_precision
from latent_reasoning.runtime.files import SUMS
from latent_reasoning.runtime.gpus import take_gpus


@dataclass(frozen=True)
class OpenFolder:
    """A model folder in memory; `prefix` stands before each question."""

    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase
    prefix: str
    precision: torch.dtype


def add_reading_options(command: argparse.ArgumentParser) -> None:
    """The options of `open_folder`."""
    add = command.add_argument
    add("--prompt-prefix", help="text before the question (default: what the card says)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto")


def open_folder(path: Path, options: argparse.Namespace) -> OpenFolder:
    """Read a model folder, and try a foreign one. Raises `CheckpointError` if it holds no model."""
    device = resolve_device(options.device)
    tokenizer, prefix = load_tokenizer(path), options.prompt_prefix
    model = load(path, device.type)
    if not (path / SUMS).exists():
        check_reading(model.base)
    return OpenFolder(
        model,
        tokenizer,
        prompt_prefix(path) if prefix is None else prefix,
        resolve_precision(options.precision, device),
    )


def evaluate_folder(options: argparse.Namespace) -> None:
    """Evaluate the folder `options.path`; its options are those of `folder_options`."""
    rows = read_free_rows(options.data, options.limit)
    take_gpus(options.device)
    folder = open_folder(options.path, options)
    rows, _ = apply_special_token_policy(rows, folder.tokenizer, "error")
    settings = EvaluationSettings(
        prefix=folder.prefix,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        forced_steps=options.forced_steps,
        max_forced_steps=options.max_forced_steps,
    )
    evaluation = evaluate(folder.model, folder.tokenizer, rows, settings, folder.precision)
    if options.output is None:
        summary = summarise(evaluation.frame(), evaluation.seconds)
    else:
        summary = write_evaluation(options.output, evaluation)
    print(summary_text(f"{options.path} on {options.data}", summary))
    for point in evaluation.forced:
        print(f"  forced to {point.latent_steps} latent steps: {100 * point.accuracy:.2f} %")


def folder_options(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """Read the command line of `evaluate_folder`."""
    section, runtime = EvaluationSection(), Runtime()
    command = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command.add_argument
    add("--path", type=Path, required=True, metavar="MODEL_DIR", help="model folder")
    add("--data", type=Path, required=True, metavar="FILE", help="JSON lines: question, answer")
    add("--output", type=Path, metavar="DIR", help="write summary, predictions and tables here")
    add("--limit", type=_positive, help="first rows only")
    add("--forced-steps", type=_count, help="make every row take this many latent steps")
    add("--max-forced-steps", type=_count, help="measure accuracy at every forced n up to this")
    add("--max-new-tokens", type=_positive, default=section.max_new_tokens)
    add("--batch-size", type=_positive, default=runtime.evaluation_batch_size)
    add_reading_options(command)
    return command.parse_args(arguments)


def read_free_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Rows of any file of JSON lines; `{file name}-{line from 0}` is a row's id.

    Raises `DataError`, naming file and line, also for an answer without a number: nothing could
    match it.
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
