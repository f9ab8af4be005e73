"""Evaluate any Hugging Face or latent model folder on any file of rows.

`ask` and `python -m latent_reasoning.evaluation --path` read a folder in the same way.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Evaluation as EvaluationSection
from latent_reasoning.config import NumberRule, Runtime, UserError
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import apply_special_token_policy
from latent_reasoning.data.sources import file_records, read_records
from latent_reasoning.evaluation.evaluator import EvaluationSettings, evaluate
from latent_reasoning.evaluation.metrics import summarise
from latent_reasoning.evaluation.records import summary_text, write_evaluation
from latent_reasoning.model.card import prompt_prefix
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.self_check import check_reading
from latent_reasoning.model.special_tokens import check_tokenizer
from latent_reasoning.runtime.command import count, described, positive
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


def add_reading_options(
    command: argparse.ArgumentParser,
    precisions: Sequence[str] = ("auto", "float32", "bfloat16"),
) -> None:
    """The options of `open_folder`; the first of `precisions` is the default."""
    add = command.add_argument
    add("--prompt-prefix", help="text before the question (default: what the card says)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=precisions, default=precisions[0])


def open_folder(path: Path, options: argparse.Namespace) -> OpenFolder:
    """Read a model folder, and try a foreign one. Raises `CheckpointError` if it holds no model,
    and `DataError` where its tokenizer does not keep text."""
    device = resolve_device(options.device)
    tokenizer, prefix = load_tokenizer(path), options.prompt_prefix
    model = load(path, device.type)
    check_tokenizer(tokenizer, model.base)
    if not (path / SUMS).exists():
        check_reading(model.base)
    return OpenFolder(
        model,
        tokenizer,
        prompt_prefix(path) if prefix is None else prefix,
        resolve_precision(options.precision, device),
    )


def evaluate_folder(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Evaluate the folder `options.path` on rows; its options are those of `folder_options`."""
    if options.output is not None:
        check_output(options.output)
    take_gpus(options.device)
    folder = open_folder(options.path, options)
    kept = without_special_text(rows, folder.tokenizer, options.special_token_text, options.data)
    settings = EvaluationSettings(
        prefix=folder.prefix,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        forced_steps=options.forced_steps,
        max_forced_steps=options.max_forced_steps,
        number_rule=options.number_rule,
    )
    evaluation = evaluate(folder.model, folder.tokenizer, kept, settings, folder.precision)
    if options.output is None:
        summary = summarise(evaluation.frame(), evaluation.seconds)
    else:
        summary = write_evaluation(options.output, evaluation)
    print(summary_text(f"{options.path} on {options.data}", summary))
    for point in evaluation.forced:
        print(f"  forced to {point.latent_steps} latent steps: {100 * point.accuracy:.2f} %")


def without_special_text(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    policy: Literal["error", "skip", "escape", "keep"],
    file: Path,
) -> list[Row]:
    """Rows by `apply_special_token_policy`; prints how many of the file's are skipped.

    Raises `DataError` where none is left.
    """
    kept, skipped = apply_special_token_policy(rows, tokenizer, policy)
    if skipped:
        print(f"{file}: {skipped} rows with special-token text are skipped")
    if not kept:
        raise DataError(f"{file}: all {skipped} rows hold special-token text")
    return kept


def check_output(output: Path) -> None:
    """Refuse, before the work, a folder that cannot be written, or that holds anything but an
    earlier result: it is replaced whole."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; name a folder")
    earlier = all((output / name).is_file() for name in (SUMS, "summary.json"))
    if output.is_dir() and any(output.iterdir()) and not earlier:
        raise UserError(
            f"--output: {output} holds other files, and is replaced whole; name a new one"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output: {output.parent} cannot be written")


def folder_options(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """Read the command line of `evaluate_folder`."""
    section, runtime = EvaluationSection(), Runtime()
    command = described(description)
    add = command.add_argument
    add("--path", type=Path, required=True, metavar="MODEL_DIR", help="model folder")
    add("--data", type=Path, required=True, metavar="FILE", help="rows: question, answer")
    add("--output", type=Path, metavar="DIR", help="write summary, predictions and tables here")
    add("--limit", type=positive, help="first rows only")
    add("--on-bad-row", choices=("error", "skip"), default="error", help="as data.on_bad_row")
    add(
        "--special-token-text",
        choices=("error", "skip", "escape", "keep"),
        default="error",
        help="text that the tokenizer reads as a special token: as data.special_token_text",
    )
    add("--number-rule", choices=get_args(NumberRule), default="exact", help="as data.number_rule")
    add("--forced-steps", type=count, help="make every row take this many latent steps")
    add("--max-forced-steps", type=count, help="measure accuracy at every forced n up to this")
    add("--max-new-tokens", type=positive, default=section.max_new_tokens)
    add("--batch-size", type=positive, default=runtime.evaluation_batch_size)
    add_reading_options(command)
    return command.parse_args(arguments)


def read_free_rows(
    path: Path,
    limit: int | None = None,
    rule: NumberRule = "exact",
    on_bad_row: Literal["error", "skip"] = "error",
) -> list[Row]:
    """Rows of any file of rows; `{file name}-{line from 0}` is a row's id.

    Prints how many answers are no plain numbers, with an example. Raises `DataError`, naming file
    and line, also for an answer that holds no single number: nothing could match it.
    """
    return read_records(
        path.stem,
        islice(file_records(path), limit),
        on_bad_row=on_bad_row,
        rule=rule,
        log=print,
        hint="--on-bad-row skip",
    ).rows
