"""What SFT starts from: the model, its tokenizer and the task.

Token SFT starts from a plain language model, latent SFT from any model: a plain one is made a
latent reasoner first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import (
    ConfigError,
    CurriculumModel,
    Data,
    LatentSftModel,
    Model,
    SftModel,
    TeacherForcedModel,
)
from latent_reasoning.data.examples import LatentExample, PlainExample
from latent_reasoning.data.round_trip import check_answers, check_round_trip
from latent_reasoning.data.rows import Row
from latent_reasoning.model.base_files import load_base
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_tokens import make_latent
from latent_reasoning.model.step_decoder import attach_step_decoder
from latent_reasoning.runtime.device import autocast, resolve_precision
from latent_reasoning.sft.examples import (
    latent_examples,
    token_sft_examples,
    without_negative_answers,
)
from latent_reasoning.sft.latent_sft import LatentSftTask
from latent_reasoning.sft.teacher import TeacherStates, teacher_states, teacher_traces
from latent_reasoning.sft.warm_start import warm_start
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.text import TextTask


def build(
    run: TrainingRun,
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, TextTask | LatentSftTask]:
    """The model of `run` before training, its tokenizer and its task.

    Raises `ConfigError` where it cannot start from its parent, `DataError` where no row is left.
    """
    return _token_sft(run, run.entry) if run.stage == "sft" else _latent_sft(run, run.entry)


def _token_sft(
    run: TrainingRun, entry: SftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, TextTask]:
    model, tokenizer = plain_model(run, entry, "token SFT")
    rows = run.training_rows(tokenizer)
    check_answers(tokenizer, rows)
    examples = token_sft_examples(rows, tokenizer, entry, run.experiment.data)
    check_positions(model, max(map(len, examples)), run.experiment.data)
    longest = max(len(example) - example.question_length for example in examples)
    task = TextTask(
        run.name,
        model,
        examples,
        entry.training,
        run.experiment.runtime,
        seed=run.seed,
        pad_id=tokenizer.pad_token_id,
        validate=run.validation(model, tokenizer, longest_completion=longest),
        processes=run.processes,
    )
    return model, tokenizer, task


def _latent_sft(
    run: TrainingRun, entry: LatentSftModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase, LatentSftTask]:
    model, tokenizer = latent_model(run, entry)
    data, distillation = run.experiment.data, entry.distillation
    rows = checked_rows(run, tokenizer)
    teacher = None
    if distillation.teacher != "self":
        teacher = load(run.parents[distillation.teacher], run.device.type)
        teacher.captured.when = run.experiment.runtime.cuda_graphs
    if teacher is not None and distillation.traces == "teacher":
        rows = _traces(run, teacher, rows)
    examples = latent_examples(rows, tokenizer, entry, data, name=run.name, seed=run.seed)
    check_positions(model, max(max(len(e.teacher), len(e.student)) for e in examples), data)
    if entry.filter_warm_start:
        _warm_start(run, model, [example.teacher for example in examples], tokenizer.pad_token_id)
    states = None
    if teacher is not None and (distillation.codi_weight or distillation.meaned_weight):
        states = _states(run, teacher, model, examples)
    if entry.step_decoder is not None:
        attach_step_decoder(model, load_base(run.parents["base"]))
    students = [example.student for example in examples]
    longest = max(len(student) - student.question_length for student in students)
    task = LatentSftTask(
        run.name,
        model,
        examples,
        entry,
        run.experiment.runtime,
        seed=run.seed,
        pad_id=tokenizer.pad_token_id,
        validate=run.validation(model, tokenizer, longest_completion=longest),
        teacher_states=states,
        processes=run.processes,
    )
    return model, tokenizer, task


def _warm_start(
    run: TrainingRun, model: LatentReasoner, teachers: Sequence[PlainExample], pad_id: int
) -> None:
    """Let the filter of `model` begin as soft re-embedding, and say how well it does."""
    unexplained = warm_start(
        model,
        teachers,
        steps=run.entry.filter_warm_start,
        pad_id=pad_id,
        batch_size=run.experiment.runtime.evaluation_batch_size,
    )
    if unexplained is not None:
        run.processes.print(
            f"{run.name}: the filter begins as soft re-embedding; {unexplained:.2g} of the "
            "variance is left"
        )


def check_positions(model: LatentReasoner, longest: int, data: Data) -> None:
    """Raise `ConfigError` where the `longest` example goes past the base's last position."""
    limit = model.position_limit
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_tokens: {data.max_tokens} is more than the {limit} positions of "
            f"{type(model.base).__name__}, and there are rows of up to {longest} tokens; set it to "
            f"{limit}"
        )


def checked_rows(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows of a latent model's training, whose answers will be judged right.

    Raises `DataError` where one would not be.
    """
    rows = without_negative_answers(run.training_rows(tokenizer), run.experiment.data)
    check_answers(tokenizer, rows)
    return rows


def plain_model(
    run: TrainingRun, entry: SftModel | CurriculumModel, method: str
) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """The plain language model that a `method` starts from, its adapter attached, its tokenizer.

    Raises `ConfigError` where it is none, `DataError` as `latent_model`.
    """
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, run.device.type), load_tokenizer(parent)
    check_round_trip(tokenizer)
    if model.settings is not None:
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} reasons in latent steps; {method} starts from "
            "a plain language model"
        )
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    return model, tokenizer


def latent_model(
    run: TrainingRun, entry: LatentSftModel | CurriculumModel | TeacherForcedModel
) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """The model that latent SFT starts from, made a latent reasoner if it is not one, with its
    adapter attached, and its tokenizer.

    A latent reasoner keeps its filter and special tokens, and takes the entry's settings of the
    stop head. Raises `ConfigError` where the entry names others, `DataError` where what the
    tokenizer reads would not be judged right.
    """
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, "cpu"), load_tokenizer(parent)
    if model.settings is None:
        model = make_latent(model.base, tokenizer, entry.model)
    else:
        _take_over_settings(model, run.name, entry.start, entry.model)
        if isinstance(entry, LatentSftModel) and entry.filter_warm_start:
            raise ConfigError(
                f"models.{run.name}.filter_warm_start: {entry.filter_warm_start} is for a new "
                f"filter, but {entry.start} has a trained one; set it to 0 here"
            )
    if isinstance(entry, LatentSftModel) and entry.model.stop_rule == "fixed":
        model.change_settings(max_latent_steps=entry.latent_steps.max)
    check_round_trip(tokenizer)
    model = model.to(run.device)
    if entry.lora is not None:
        attach_lora(model, entry.lora)
    return model, tokenizer


def _take_over_settings(model: LatentReasoner, name: str, start: str, wanted: Model) -> None:
    """Change the stop head's settings to `wanted`, and remove a bound on steps that RL set."""
    if model.settings.recurrent_filter != wanted.recurrent_filter:
        raise ConfigError(
            f"models.{name}.model.recurrent_filter: {wanted.recurrent_filter}, but {start} has "
            f"{model.settings.recurrent_filter}; set the same filter"
        )
    of_mixture = ("mixture_size", "mixture_temperature")
    own_keys = of_mixture if wanted.recurrent_filter == "mixture" else ()
    for key in ("filter_width", "filter_norm", "deterministic_latents", *own_keys):
        if getattr(model.settings, key) != getattr(wanted, key):
            raise ConfigError(
                f"models.{name}.model.{key}: {getattr(wanted, key)}, but {start} has "
                f"{getattr(model.settings, key)}; set the same"
            )
    for key in ("start_token_from", "end_token_from"):
        if getattr(wanted, key) is not None:
            raise ConfigError(
                f"models.{name}.model.{key}: {getattr(wanted, key)!r} is for a plain language "
                f"model, but {start} has learned this token already; set it to null here"
            )
    model.change_settings(
        stop_head_temperature=wanted.stop_head_temperature,
        detach_stop_head=wanted.detach_stop_head,
        allow_rethinking=wanted.allow_rethinking,
        stop_rule=wanted.stop_rule,
        max_latent_steps=None,
    )


def _traces(run: TrainingRun, teacher: LatentReasoner, rows: Sequence[Row]) -> list[Row]:
    """The rows that the frozen teacher answers right, with its own reasoning."""
    data = run.experiment.data
    with _teacher_pass(run) as folder:
        kept = teacher_traces(
            teacher,
            load_tokenizer(run.parents[run.entry.distillation.teacher]),
            rows,
            folder=folder,
            prefix=data.prompt.training,
            max_new_tokens=data.max_tokens,
            batch_size=run.experiment.runtime.evaluation_batch_size,
            number_rule=data.number_rule,
        )
    run.processes.print(f"{run.name}: {len(kept)} of {len(rows)} traces of the teacher are right")
    return kept


def _states(
    run: TrainingRun,
    teacher: LatentReasoner,
    student: LatentReasoner,
    examples: Sequence[LatentExample],
) -> TeacherStates:
    """The frozen teacher's states of all examples."""
    distillation = run.entry.distillation
    with _teacher_pass(run) as folder:
        return teacher_states(
            teacher,
            student,
            [example.teacher for example in examples],
            distillation,
            folder=folder,
            pad_id=load_tokenizer(run.parents[distillation.teacher]).pad_token_id,
            batch_size=run.experiment.runtime.evaluation_batch_size,
        )


@contextlib.contextmanager
def _teacher_pass(run: TrainingRun) -> Iterator[Path]:
    """The folder for what a frozen teacher wrote; the first process enters the block first."""
    precision = resolve_precision(run.experiment.runtime.precision, run.device)
    folder = run.claim_checkpoint_folder()
    with run.processes.main_first(), autocast(run.device, precision):
        yield folder
