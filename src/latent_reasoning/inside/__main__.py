"""The stage inside: what happens within a model while it reasons.

    python -m latent_reasoning.inside --config FILE.. --model NAME --seed N --dataset D

looks into a latent model of an experiment and writes
`results/{experiment}/inside/{model}/seed-{seed}/{dataset}/`.

    python -m latent_reasoning.inside --path MODEL --data FILE --output DIR [--limit N]

looks into any model: a latent one on rows with `question`, `steps` and `answer` (.jsonl, .json,
.parquet), with probes trained on the rows after the limit; a plain one, a folder or a .gguf file,
on rows or on the lines of any text file (.txt). `DIR/inside.html` shows what was found.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from latent_reasoning.base.sources import read_gguf
from latent_reasoning.config import Inside, UserError, load
from latent_reasoning.dag.digests import check_digest, science
from latent_reasoning.dag.layout import Layout, probe_rows
from latent_reasoning.data.rows import Row, read_rows
from latent_reasoning.data.sequences import apply_special_token_policy
from latent_reasoning.evaluation.folder import add_reading_options, open_folder, read_free_rows
from latent_reasoning.inside.page import write_page
from latent_reasoning.inside.reasoning import Subject
from latent_reasoning.inside.sequences import Text, row_sequences, text_sequences
from latent_reasoning.inside.study import Options, Study, study_latent, study_plain
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.runtime.command import count, parser, positive, run_stage
from latent_reasoning.runtime.device import autocast, resolve_device, resolve_precision
from latent_reasoning.runtime.gpus import take_gpus


def main(arguments: list[str] | None = None) -> None:
    """Look into a model of an experiment, or with `--path` into any."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--path", nargs="?", const="")
    chosen, _ = chooser.parse_known_args(arguments)
    if chosen.path is None:
        study_model(parser(__doc__, model=True, dataset=True).parse_args(arguments))
    else:
        study_folder(_folder_options(arguments))


def study_model(options: argparse.Namespace) -> None:
    """Look into a model of an experiment; the files go where the workflow expects them."""
    experiment = load(options.config)
    check_digest(experiment, "inside", options.digest, options.model)
    layout, section, runtime = Layout.of(experiment), experiment.inside, experiment.runtime
    torch.set_num_threads(runtime.threads)
    take_gpus(runtime.device)
    device = resolve_device(runtime.device)
    folder = layout.model(options.model, options.seed)
    model = load_model(folder, device.type)
    if model.settings is None:
        raise UserError(f"models.{options.model}: a plain model; --path looks into those")
    subject = Subject(
        model.requires_grad_(False).eval(),
        load_tokenizer(folder),
        experiment.data.prompt.evaluation,
        experiment.data.number_rule,
        experiment.runtime.evaluation_batch_size,
    )
    rows, training = (
        apply_special_token_policy(
            read_rows(layout.data(split))[: section.rows],
            subject.tokenizer,
            experiment.data.special_token_text,
        )[0]
        for split in (options.dataset, probe_rows(options.dataset))
    )
    forced = getattr(experiment.models[options.model], "forced_steps", None)
    wanted = Options(section.sample, experiment.evaluation.max_forced_steps, forced)
    precision = resolve_precision(runtime.precision, device)
    with threadpool_limits(runtime.threads), autocast(device, precision):
        study = study_latent(subject, rows, training, wanted)
    study.summary |= {"model": options.model, "seed": options.seed, "dataset": options.dataset}
    _write(
        study,
        layout.inside(options.model, options.seed, options.dataset),
        science(experiment, "inside", options.model),
    )


def study_folder(options: argparse.Namespace) -> None:
    """Look into a folder or a GGUF file."""
    take_gpus(options.device)
    if options.path.suffix == ".gguf":
        model, tokenizer = read_gguf(options.path)
        device = resolve_device(options.device)
        prefix, precision = options.prompt_prefix or "", resolve_precision("float32", device)
        model = model.to(device)
    else:
        opened = open_folder(options.path, options)
        model, tokenizer, prefix = opened.model, opened.tokenizer, opened.prefix
        precision = opened.precision
    model.requires_grad_(False).eval()
    subject = Subject(model, tokenizer, prefix, batch=options.batch_size)
    wanted = Options(options.sample, options.max_steps)
    with autocast(model.device, precision):
        if model.settings is None:
            study = study_plain(subject, _texts(subject, options), wanted)
        else:
            rows = _rows(subject, options, 2 * options.limit)
            training = rows[options.limit :]
            study = study_latent(subject, rows[: options.limit], training, wanted)
    study.summary |= {"model": options.path.name, "seed": 0, "dataset": options.data.stem}
    _write(study, options.output)
    write_page([options.output], options.output / "inside.html", f"Inside {options.path.name}")


def _texts(subject: Subject, options: argparse.Namespace) -> list[Text]:
    """What a plain model reads: rows, or the lines of a text file."""
    if options.data.suffix != ".txt":
        return row_sequences(subject, _rows(subject, options, options.limit))
    lines = options.data.read_text(encoding="utf-8").splitlines()
    texts = text_sequences(subject, [line for line in lines if line.strip()][: options.limit])
    if not texts:
        raise UserError(f"--data: {options.data} holds no text; give a file with a text a line")
    return texts


def _rows(subject: Subject, options: argparse.Namespace, limit: int) -> Sequence[Row]:
    rows = read_free_rows(options.data, limit)
    return apply_special_token_policy(rows, subject.tokenizer, "skip")[0]


def _write(study: Study, folder: Path, recorded: dict | None = None) -> None:
    """Write the study with its figures, and say what it took."""
    study.summary["peak_memory_mb"] = _peak_memory_mb()
    study.write(folder, recorded)
    print(
        f"{study.summary['model']}: {study.summary['n']} rows in {study.summary['seconds']:.1f} s, "
        f"at most {study.summary['peak_memory_mb']} MB; see {folder}"
    )


def _peak_memory_mb() -> int:
    """The most memory that this process has held, the model's included."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def _folder_options(arguments: list[str] | None) -> argparse.Namespace:
    section = Inside()
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command.add_argument
    add("--path", type=Path, required=True, metavar="MODEL", help="model folder or .gguf file")
    add("--data", type=Path, required=True, metavar="FILE", help="rows, or a text a line (.txt)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of tables and figures")
    add("--limit", type=positive, default=section.rows, help="first rows only")
    add("--sample", type=positive, default=section.sample, help="rows for what is costly")
    add("--max-steps", type=count, default=10, help="most latent steps that are looked at")
    add("--batch-size", type=positive, default=64)
    add_reading_options(command)
    return command.parse_args(arguments)


if __name__ == "__main__":
    run_stage(main)
