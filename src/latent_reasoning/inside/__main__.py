"""The stage inside: what happens within a model while it reasons.

    python -m latent_reasoning.inside --config FILE.. --model NAME --seed N --dataset D

looks into a latent model of an experiment and writes
`results/{experiment}/inside/{model}/seed-{seed}/{dataset}/`.

    python -m latent_reasoning.inside --path MODEL --data FILE --output DIR [--limit N]

looks into any model: a latent one on rows with `question`, `steps` and `answer` (.jsonl, .json,
.parquet), with probes trained on the rows after the limit; a plain one, a folder or a .gguf file,
on rows or on the lines of any text file (.txt). `DIR/inside.html` shows what was found.

Everything is read in float32 on any device: in mixed precision, products and norms are fused, and
what lies between them could not be seen.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from latent_reasoning.base.sources import read_gguf
from latent_reasoning.config import Inside, UserError, load
from latent_reasoning.dag.digests import check_digest, science
from latent_reasoning.dag.layout import Layout, probe_rows
from latent_reasoning.data.rows import Row, read_rows
from latent_reasoning.evaluation.folder import (
    add_reading_options,
    check_output,
    open_folder,
    read_free_rows,
    without_special_text,
)
from latent_reasoning.inside.page import write_page
from latent_reasoning.inside.reasoning import Subject
from latent_reasoning.inside.sequences import Text, row_sequences, text_sequences
from latent_reasoning.inside.study import Options, Study, study_latent, study_plain
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.runtime.command import (
    count,
    described,
    names_path,
    parser,
    positive,
    run_stage,
)
from latent_reasoning.runtime.device import resolve_device
from latent_reasoning.runtime.gpus import take_gpus

ROWS = {True: Inside().rows, False: 60}
"""Rows of a latent model and of a plain one, which is large as a rule."""
SAMPLE = {True: Inside().sample, False: 6}
"""Of these rows, those for what is costly."""


def main(arguments: list[str] | None = None) -> None:
    """Look into a model of an experiment, or with `--path` into any."""
    if names_path(arguments):
        study_folder(_folder_options(arguments))
    else:
        study_model(parser(__doc__, model=True, dataset=True).parse_args(arguments))


def study_model(options: argparse.Namespace) -> None:
    """Look into a model of an experiment; the files go where the workflow expects them."""
    experiment = load(options.config)
    check_digest(experiment, "inside", options.digest, options.model)
    layout, section, runtime = Layout.of(experiment), experiment.inside, experiment.runtime
    torch.set_num_threads(runtime.threads)
    take_gpus(runtime.device)
    folder = layout.model(options.model, options.seed)
    model = load_model(folder, resolve_device(runtime.device).type)
    if model.settings is None:
        raise UserError(f"models.{options.model}: a plain model; --path looks into those")
    subject = Subject(
        model.requires_grad_(False).eval(),
        load_tokenizer(folder),
        experiment.data.prompt.evaluation,
        experiment.data.number_rule,
        runtime.evaluation_batch_size,
    )
    policy = experiment.data.special_token_text
    files = (layout.data(split) for split in (options.dataset, probe_rows(options.dataset)))
    rows, training = (
        without_special_text(read_rows(file)[: section.rows], subject.tokenizer, policy, file)
        for file in files
    )
    forced = getattr(experiment.models[options.model], "forced_steps", None)
    wanted = Options(section.sample, experiment.evaluation.max_forced_steps, forced)
    with threadpool_limits(runtime.threads):
        study = study_latent(subject, rows, training, wanted)
    study.summary |= {"model": options.model, "seed": options.seed, "dataset": options.dataset}
    _write(
        study,
        layout.inside(options.model, options.seed, options.dataset),
        science(experiment, "inside", options.model),
    )


def study_folder(options: argparse.Namespace) -> None:
    """Look into a folder or a GGUF file."""
    check_output(options.output)
    take_gpus(options.device)
    if options.path.suffix == ".gguf":
        model, tokenizer = read_gguf(options.path)
        model, prefix = model.to(resolve_device(options.device)), options.prompt_prefix or ""
    else:
        opened = open_folder(options.path, options)
        model, tokenizer, prefix = opened.model, opened.tokenizer, opened.prefix
    subject = Subject(
        model.requires_grad_(False).eval(), tokenizer, prefix, batch=options.batch_size
    )
    latent = model.settings is not None
    limit = options.limit or ROWS[latent]
    wanted = Options(options.sample or SAMPLE[latent], options.max_steps, options.forced_steps)
    if latent:
        rows = _rows(subject, options.data, 2 * limit)
        if len(rows) <= limit:
            raise UserError(
                f"--data: {options.data} has {len(rows)} rows, and probes are trained on those "
                f"after --limit {limit}: give a smaller --limit"
            )
        study = study_latent(subject, rows[:limit], rows[limit:], wanted)
    else:
        study = study_plain(subject, _texts(subject, options.data, limit), wanted)
    path = options.path.resolve()
    # The pipeline's own folders are {model}/seed-{seed}.
    name = f"{path.parent.name}, {path.name}" if path.name.startswith("seed-") else path.name
    study.summary |= {"model": name, "seed": None, "dataset": options.data.stem}
    _write(study, options.output)
    write_page([options.output], options.output / "inside.html", f"Inside {name}")


def _texts(subject: Subject, file: Path, limit: int) -> list[Text]:
    """What a plain model reads: rows, or the lines of a text file."""
    if file.suffix != ".txt":
        return row_sequences(subject, _rows(subject, file, limit))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {file} is no UTF-8 text ({error}); convert it") from None
    texts = text_sequences(subject, [line for line in lines if line.strip()][:limit])
    if not texts:
        raise UserError(f"--data: {file} holds no text; give a file with a text a line")
    return texts


def _rows(subject: Subject, file: Path, limit: int) -> list[Row]:
    return without_special_text(read_free_rows(file, limit), subject.tokenizer, "skip", file)


def _write(study: Study, folder: Path, recorded: dict | None = None) -> None:
    """Write the study with its figures, and say what it took."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the model's memory included
    study.summary["peak_memory_mb"] = round(peak / unit)
    study.write(folder, recorded)
    print(
        f"{study.summary['model']}: {study.summary['n']} rows in {study.summary['seconds']:.1f} s, "
        f"at most {study.summary['peak_memory_mb']} MB; see {folder}"
    )


def _folder_options(arguments: list[str] | None) -> argparse.Namespace:
    command = described(__doc__)
    add = command.add_argument
    add("--path", type=Path, required=True, metavar="MODEL", help="model folder or .gguf file")
    add("--data", type=Path, required=True, metavar="FILE", help="rows, or a text a line (.txt)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of tables and figures")
    rows, sample = (f"latent {of[True]}, plain {of[False]}" for of in (ROWS, SAMPLE))
    add("--limit", type=positive, help=f"first rows only ({rows})")
    add("--sample", type=positive, help=f"rows for what is costly ({sample})")
    add("--max-steps", type=count, default=10, help="most latent steps that are looked at")
    add("--forced-steps", type=count, help="latent steps of every row (the model's own decision)")
    add("--batch-size", type=positive, default=64)
    add_reading_options(command, ("float32",))
    return command.parse_args(arguments)


if __name__ == "__main__":
    run_stage(main)
