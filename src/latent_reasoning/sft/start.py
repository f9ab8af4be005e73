"""What SFT starts from: the model, its tokenizer and the task.

Token SFT starts from a plain language model, latent SFT from any model: a plain one is made a
latent reasoner first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, Data, LatentSftModel, Model, SftModel
from latent_reasoning.data.examples import LatentExample
from latent_reasoning.data.rows import Row
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent
from latent_reasoning.runtime.device import autocast, resolve_precision
from latent_reasoning.sft.examples import (
    latent_examples,
    token_sft_examples,
    without_negative_answers,
)
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.sft.teacher import TeacherStates, teacher_states, teacher_traces
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.text import TextTask


def build(
    run: TrainingRun, entry: SftModel | LatentSftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, TextTask | LatentSftTask]:
    """The model of `entry` before training, its tokenizer and its task.

    Raises `ConfigError` where it cannot start from its parent, `DataError` where no row is left.
    """
    return _token_sft(run, entry) if entry.stage == "sft" else _latent_sft(run, entry)


def _token_sft(
    run: TrainingRun, entry: SftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, TextTask]:
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, run.device.type), load_tokenizer(parent)
    if model.settings is not None:
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} reasons in latent steps; token SFT starts from "
            "a plain language model"
        )
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    rows = run.training_rows(tokenizer)
    examples = token_sft_examples(rows, tokenizer, entry, run.experiment.data)
    _check_positions(model, max(map(len, examples)), run.experiment.data)
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
        processes=run.processes,
    )
    return model, tokenizer, task


def _latent_sft(
    run: TrainingRun, entry: LatentSftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, LatentSftTask]:
    model, tokenizer = latent_model(run, entry)
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    rows = without_negative_answers(run.training_rows(tokenizer), run.experiment.data)
    teacher = _frozen_teacher(run, entry)
    if teacher is not None and entry.distillation.traces == "teacher":
        rows = _traces(run, teacher, rows)
    examples = latent_examples(
        rows, tokenizer, entry, run.experiment.data, name=run.name, seed=run.seed
    )
    longest = max(max(len(e.teacher), len(e.student)) for e in examples)
    _check_positions(model, longest, run.experiment.data)
    compared = entry.distillation.codi_weight or entry.distillation.meaned_weight
    states = None
    if teacher is not None and compared:
        states = _states(run, entry, teacher, model, examples)
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
        processes=run.processes,
    )
    return model, tokenizer, task


def _check_positions(model: LatentReasoner, longest: int, data: Data) -> None:
    """Raise `ConfigError` where the `longest` example goes past the base's last position."""
    limit = model.position_limit
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_tokens: {data.max_tokens} is more than the {limit} positions of "
            f"{type(model.base).__name__}, and there are rows of up to {longest} tokens; set it to "
            f"{limit}"
        )


def latent_model(
    run: TrainingRun, entry: LatentSftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """The model that latent SFT starts from, made a latent reasoner if it is not one.

    A latent reasoner keeps its recurrent filter and takes the entry's settings of the stop head.
    Raises `ConfigError` where the entry names another filter.
    """
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, "cpu"), load_tokenizer(parent)
    if model.settings is None:
        model = make_latent(model.base, tokenizer, entry.model)
    else:
        _take_over_settings(model, run.name, entry.start, entry.model)
    return model.to(run.device), tokenizer


def _take_over_settings(model: LatentReasoner, name: str, start: str, wanted: Model) -> None:
    """Change the stop head's settings to `wanted`, and remove a bound on steps that RL set."""
    if model.settings.recurrent_filter != wanted.recurrent_filter:
        raise ConfigError(
            f"models.{name}.model.recurrent_filter: {wanted.recurrent_filter}, but {start} has "
            f"{model.settings.recurrent_filter}; set the same filter"
        )
    model.change_settings(
        stop_head_temperature=wanted.stop_head_temperature,
        detach_stop_head=wanted.detach_stop_head,
        allow_rethinking=wanted.allow_rethinking,
        max_latent_steps=None,
    )


@dataclass(frozen=True)
class FrozenTeacher:
    """A trained model whose states, and on request traces, the student learns from."""

    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase


def _frozen_teacher(run: TrainingRun, entry: LatentSftModel) -> FrozenTeacher | None:
    name = entry.distillation.teacher
    if name == "self":
        return None
    folder = run.parents[name]
    return FrozenTeacher(load(folder, run.device.type), load_tokenizer(folder))


def _traces(run: TrainingRun, teacher: FrozenTeacher, rows: Sequence[Row]) -> list[Row]:
    data, runtime = run.experiment.data, run.experiment.runtime
    precision = resolve_precision(runtime.precision, run.device)
    folder = run.claim_checkpoint_folder()
    with run.processes.main_first(), autocast(run.device, precision):
        kept = teacher_traces(
            teacher.model,
            teacher.tokenizer,
            rows,
            folder=folder,
            prefix=data.prompt.training,
            max_new_tokens=data.max_tokens,
            batch_size=runtime.evaluation_batch_size,
        )
    run.processes.print(f"{run.name}: {len(kept)} of {len(rows)} traces of the teacher are right")
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
    folder = run.claim_checkpoint_folder()
    with run.processes.main_first(), autocast(run.device, precision):
        return teacher_states(
            teacher.model,
            student,
            [example.teacher for example in examples],
            entry.distillation,
            folder=folder,
            pad_id=teacher.tokenizer.pad_token_id,
            batch_size=runtime.evaluation_batch_size,
        )
