"""The stages sft and latent_sft: fine-tune one model of the configuration.

    python -m latent_reasoning.sft --config FILE.. --model NAME --seed N [--digest DIGEST]

reads the rows `sft` and `validation` and the model it starts from, and writes
`results/{experiment}/models/{model}/seed-{seed}/`. A run that was killed goes on from its last
checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, LatentSftModel, Model, SftModel, load
from latent_reasoning.dag.digests import check_digest
from latent_reasoning.data.answers import is_negative
from latent_reasoning.data.dial.styles import styled_reasonings
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import LatentExample, encode_latent_rows, within_limit
from latent_reasoning.model.folder import load as load_model
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.command import entry_of, parser, run_stage
from latent_reasoning.runtime.device import autocast, resolve_precision
from latent_reasoning.runtime.launch import launch_processes
from latent_reasoning.runtime.parallel import current
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.sft.teacher import TeacherStates, teacher_states, teacher_traces
from latent_reasoning.sft.token_sft import token_sft_examples
from latent_reasoning.training.loop import print_to_stderr
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.text import TextTask


def main(arguments: list[str] | None = None) -> None:
    """Fine-tune one model of an experiment."""
    options = parser(__doc__, model=True).parse_args(arguments)
    experiment = load(options.config)
    entry = entry_of(experiment, options.model, "sft", "latent_sft")
    digest = check_digest(experiment, "model", options.digest, options.model)
    launch_processes("latent_reasoning.sft", arguments, experiment.runtime)
    run = TrainingRun.of(experiment, options.model, options.seed, digest, split="sft")
    train_stage = _token_sft if entry.stage == "sft" else _latent_sft
    model, tokenizer, task = train_stage(run, entry)
    result = run.train(model, task, entry.training)
    folder = run.save(model, tokenizer, result, keep_adapter=entry.save == "adapter")
    print_to_stderr(f"{options.model}: written to {folder}")


# ------------------------------------------------------------------------------------- token SFT


def _token_sft(
    run: TrainingRun, entry: SftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, TextTask]:
    parent = run.parents[entry.start]
    model, tokenizer = load_model(parent, run.device.type), load_tokenizer(parent)
    if model.settings is not None:
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} reasons in latent steps; token SFT starts from "
            "a plain language model"
        )
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    data = run.experiment.data
    examples = token_sft_examples(run.training_rows(tokenizer), tokenizer, entry, data)
    task = TextTask(
        run.name,
        model,
        examples,
        entry.training,
        run.experiment.runtime,
        seed=run.seed,
        pad_id=tokenizer.pad_token_id,
        validate=run.validation(
            model,
            tokenizer,
            entry.training,
            longest_completion=max(len(e) - e.question_length for e in examples),
        ),
    )
    return model, tokenizer, task


# ------------------------------------------------------------------------------------ latent SFT


def _latent_sft(
    run: TrainingRun, entry: LatentSftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, LatentSftTask]:
    model, tokenizer = latent_model(run, entry)
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    rows = run.training_rows(tokenizer)
    if run.experiment.data.drop_negative_for_sft:
        rows = [row for row in rows if not is_negative(row.answer)]
    teacher = _frozen_teacher(run, entry)
    if teacher is not None and entry.distillation.traces == "teacher":
        rows = _traces(run, teacher, rows)
    examples = latent_examples(run, entry, rows, tokenizer)
    states = None if teacher is None else _states(run, entry, teacher, model, examples)
    task = LatentSftTask(
        run.name,
        model,
        examples,
        entry,
        run.experiment.runtime,
        seed=run.seed,
        pad_id=tokenizer.pad_token_id,
        validate=run.validation(
            model,
            tokenizer,
            entry.training,
            longest_completion=max(len(e.student) - e.student.question_length for e in examples),
            forced_steps=entry.forced_steps,
        ),
        teacher_states=states,
    )
    return model, tokenizer, task


def latent_model(
    run: TrainingRun, entry: LatentSftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """The model it starts from, made a latent reasoner if it is none.

    One that is keeps its recurrent filter and takes over the stop head's settings. Raises
    `ConfigError` where its filter is another.
    """
    parent = run.parents[entry.start]
    model, tokenizer = load_model(parent, "cpu"), load_tokenizer(parent)
    if model.settings is None:
        model = make_latent(model.base, tokenizer, entry.model)
    else:
        _take_over_settings(model, run.name, entry.start, entry.model)
    return model.to(run.device), tokenizer


def _take_over_settings(model: LatentReasoner, name: str, start: str, wanted: Model) -> None:
    """Change the stop head's settings to the wanted ones, and lift a bound that RL set."""
    if model.settings.recurrent_filter != wanted.recurrent_filter:
        raise ConfigError(
            f"models.{name}.model.recurrent_filter: {wanted.recurrent_filter}, but {start} has "
            f"{model.settings.recurrent_filter}; give the same"
        )
    model.change_settings(
        stop_head_temperature=wanted.stop_head_temperature,
        detach_stop_head=wanted.detach_stop_head,
        allow_rethinking=wanted.allow_rethinking,
        max_latent_steps=None,
    )


def latent_examples(
    run: TrainingRun,
    entry: LatentSftModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
) -> list[LatentExample]:
    """The rows as teacher and student read them, those above the token limit left out."""
    data = run.experiment.data
    reasonings = styled_reasonings(
        rows,
        entry.teacher_texts,
        seed=run.seed,
        natural_language=data.natural_language,
        drop_last_step=entry.drop_last_step,
    )
    examples = encode_latent_rows(
        rows,
        tokenizer,
        steps=entry.latent_steps,
        prefix=data.prompt.training,
        natural_language=data.natural_language,
        drop_last_step=entry.drop_last_step,
        shift_target=entry.shift_target,
        mask_latent_labels=entry.mask_latent_labels,
        learn_start=entry.learn_start,
        reasonings=reasonings,
        readout=random_readout(entry, run.seed),
    )
    kept = [example for example in examples if within_limit(example, data.max_tokens)]
    if not kept:
        raise DataError(
            f"no row of {len(rows)} is left for {run.name}: answers that are negative and "
            f"sequences longer than data.max_tokens: {data.max_tokens} allows are dropped"
        )
    return kept


def random_readout(entry: LatentSftModel, seed: int) -> Callable[[Row, int], int]:
    """After how many of its n latent steps a row answers.

    A share of the rows answers anywhere from as many steps as the teacher's text has to n; a
    function of the seed and the row's id. A model that has only ever answered after n steps cannot
    be taught by RL to answer sooner.
    """

    def steps(row: Row, n: int) -> int:
        generator = random.Random(seeds.seed_for(seed, seeds.RANDOM_READOUT.format(row=row.id)))
        if generator.random() >= entry.random_readout:
            return n
        told = len(row.steps) - entry.drop_last_step
        return generator.randint(min(max(told, 0), n), n)

    return steps


@dataclass(frozen=True)
class FrozenTeacher:
    """Another model, whose states or traces are learned from."""

    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase


def _frozen_teacher(run: TrainingRun, entry: LatentSftModel) -> FrozenTeacher | None:
    name = entry.distillation.teacher
    if name == "self":
        return None
    folder = run.parents[name]
    return FrozenTeacher(load_model(folder, run.device.type), load_tokenizer(folder))


def _traces(run: TrainingRun, teacher: FrozenTeacher, rows: Sequence[Row]) -> list[Row]:
    data, runtime = run.experiment.data, run.experiment.runtime
    precision = resolve_precision(runtime.precision, run.device)
    folder = run.checkpoints
    with current().main_first(), autocast(run.device, precision):
        kept = teacher_traces(
            teacher.model,
            teacher.tokenizer,
            rows,
            folder=folder,
            prefix=data.prompt.training,
            max_new_tokens=data.max_tokens,
            batch_size=runtime.evaluation_batch_size,
        )
    print_to_stderr(f"{run.name}: {len(kept)} of {len(rows)} traces of the teacher are right")
    return kept


def _states(
    run: TrainingRun,
    entry: LatentSftModel,
    teacher: FrozenTeacher,
    student: LatentReasoner,
    examples: Sequence[LatentExample],
) -> TeacherStates:
    runtime = run.experiment.runtime
    precision = resolve_precision(runtime.precision, run.device)
    folder = run.checkpoints
    with current().main_first(), autocast(run.device, precision):
        return teacher_states(
            teacher.model,
            student,
            [example.teacher for example in examples],
            entry.distillation,
            folder=folder,
            pad_id=teacher.tokenizer.pad_token_id,
            batch_size=runtime.evaluation_batch_size,
        )


if __name__ == "__main__":
    run_stage(main)
