"""The stage curriculum: supervised training whose sequences lose their reasoning text by stages.

One sequence a row: question, a latent run where the method has latents, what is left of the
reasoning as text, and the answer; all text after the question (and the run) is learned. What a row
reads at a step is a pure function of the row, the stage and draws that depend on the seed, the step
and the row alone.

| method | what is removed | what takes its place |
|---|---|---|
| `coconut` | steps, the first ones first | latent steps fed by the hidden state (`coconut.py`) |
| `pause` | the same | latent steps fed by a learnt vector |
| `no_thought` | the same | nothing |
| `icot` | tokens | nothing (`icot.py`) |

Only validations of the last stage select weights, with the number of latent steps of the
evaluation; before it the model still writes what is left of the reasoning, and its accuracy is
logged as `stage_accuracy`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import CurriculumModel
from latent_reasoning.data.examples import PlainExample, StagedRow, within_limit
from latent_reasoning.data.rows import DataError
from latent_reasoning.data.sequences import (
    SpecialTokens,
    encode_staged_rows,
    latent_run,
    special_token_ids,
)
from latent_reasoning.data.step_texts import texts_of_groups
from latent_reasoning.model.base_files import load_base
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.step_decoder import attach_step_decoder
from latent_reasoning.rivals.coconut import Stages, mixed_stage
from latent_reasoning.rivals.icot import Removal
from latent_reasoning.runtime import seeds
from latent_reasoning.sft.examples import step_ids
from latent_reasoning.sft.start import check_positions, checked_rows, latent_model, plain_model
from latent_reasoning.training.curriculum import Curriculum
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.text import TextTask


class RowCurriculum(Curriculum, Protocol):
    """A curriculum that says what is read of each row."""

    def example(self, row: StagedRow, step: int, draws: random.Random) -> PlainExample:
        """What is read of a row at a step."""

    def beginning(self, stage: int) -> list[int]:
        """What stands between START and the text at a stage; empty without latent steps."""


@dataclass(frozen=True)
class StepCurriculum:
    """Steps are removed: each stage lasts `steps_per_stage` optimiser steps, the last one longer.

    With probability `mix` a row is read at a stage of its own. `special` None: nothing takes the
    place of removed steps.
    """

    stages: Stages
    first_stage: int
    steps_per_stage: int
    mix: float
    resets_optimizer: bool
    special: SpecialTokens | None

    def stage(self, step: int) -> int:
        """The stage of optimiser step `step` (from 0)."""
        return min(self.first_stage + step // self.steps_per_stage, self.stages.last)

    def example(self, row: StagedRow, step: int, draws: random.Random) -> PlainExample:
        """The row without its first steps, with latent steps in their place."""
        stage = mixed_stage(row.steps, self.stage(step), self.mix, draws)
        latents, left_out = self.stages.of_training(row.steps, stage)
        example = row.example(self._run(latents), row.texts[left_out])
        if row.step_ids is None:
            return example
        *ending, eos = row.ending
        texts = texts_of_groups(
            row.step_ids[:left_out],
            [*row.texts[left_out], *ending],
            latents // self.stages.latents_per_step,
            separator=(),
            eos_id=eos,
        )
        return replace(example, step_texts=texts)

    def beginning(self, stage: int) -> list[int]:
        """CONTINUE, as often as rows with steps enough have it, and STOP."""
        return self._run(self.stages.of_evaluation(self.stages.last_latent_stage, stage))[1:]

    def _run(self, latents: int) -> list[int]:
        return [] if self.special is None else latent_run(latents, self.special)


@dataclass(frozen=True)
class TokenCurriculum:
    """Tokens are removed: a stage is the scheduled number of them, at most all of the `longest`
    reasoning."""

    removal: Removal
    longest: int
    resets_optimizer: bool

    def stage(self, step: int) -> int:
        """The stage of optimiser step `step` (from 0)."""
        return int(min(self.removal.scheduled(step), self.longest))

    def example(self, row: StagedRow, step: int, draws: random.Random) -> PlainExample:
        """The row without the first or last tokens of its reasoning."""
        removal, offset = self.removal, self.removal.offset(draws)
        number = removal.removed(step, removal.scheduled(step), offset)
        return row.example([], removal.remainder(row.texts[0], number))

    def beginning(self, stage: int) -> list[int]:
        """Nothing."""
        return []


@dataclass
class CurriculumTask(TextTask):
    """Learn rows that a curriculum shortens; `examples` are the whole rows.

    `validate` is called without what the loop knows: it is the validation of the stage of the last
    step that was read.
    """

    rows: Sequence[StagedRow] = field(kw_only=True)
    curriculum: RowCurriculum = field(kw_only=True)
    stage: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole, self.last_stage = self.validate, self.curriculum.stage(self.training.steps - 1)

        def validate() -> dict[str, float]:
            measured = whole()
            if self.stage == self.last_stage:
                return measured
            measured.pop("validation_rows", None)
            renamed = {name.replace("validation_", "stage_"): v for name, v in measured.items()}
            return {"curriculum_stage": float(self.stage), **renamed}

        self.validate = validate

    def micro_batches(self, step: int) -> list[Any]:
        """As for text, at the step's stage."""
        self.stage = self.curriculum.stage(step)
        return super().micro_batches(step)

    def example(self, step: int, index: int) -> PlainExample:
        """What is read of a row; its draws depend on the step and the row alone."""
        purpose = seeds.CURRICULUM.format(model=self.name, step=step, example=index)
        draws = random.Random(seeds.seed_for(self.seed, purpose, self.plan.rollbacks))
        return self.curriculum.example(self.rows[index], step, draws)

    def beginning(self) -> list[int] | None:
        """What completions begin with in validation; None in the last stage, whose number of latent
        steps is the evaluation's, and without latent steps."""
        return (self.stage != self.last_stage and self.curriculum.beginning(self.stage)) or None


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, CurriculumTask]:
    """The model of `run` before training, its tokenizer and its task."""
    entry: CurriculumModel = run.entry
    if entry.has_latents:
        model, tokenizer = latent_model(run, entry)
    else:
        model, tokenizer = plain_model(run, entry, entry.method)
    if entry.step_decoder is not None:
        attach_step_decoder(model, load_base(run.parents["base"]))
    rows = _rows(run, tokenizer)
    special = special_token_ids(tokenizer) if entry.has_latents else None
    curriculum = _curriculum(entry, rows, special)
    most = curriculum.beginning(curriculum.stage(entry.training.steps - 1))
    examples = [row.example([], row.texts[0]) for row in rows]
    longest = max(map(len, examples)) + len(most)
    check_positions(model, longest, run.experiment.data)
    task = CurriculumTask(
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
            longest_completion=max(len(e) - e.question_length for e in examples),
            beginning=lambda: task.beginning(),
        ),
        processes=run.processes,
        rows=rows,
        curriculum=curriculum,
        step_decoder=entry.step_decoder,
        latents_per_text=entry.latents_per_step,
    )
    return model, tokenizer, task


def _rows(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> list[StagedRow]:
    """The training rows within the token limit, all text still there."""
    data, rows = run.experiment.data, checked_rows(run, tokenizer)
    staged = encode_staged_rows(
        rows,
        tokenizer,
        prefix=data.prompt.training,
        natural_language=data.natural_language,
    )
    if run.entry.step_decoder is not None:
        steps = step_ids(rows, tokenizer, natural_language=data.natural_language)
        staged = [replace(r, step_ids=own) for r, own in zip(staged, steps, strict=True)]
    kept = [r for r in staged if within_limit(r.example([], r.texts[0]), data.max_tokens)]
    if not kept:
        raise DataError(
            f"no row of {len(rows)} is left for {run.name}: sequences longer than "
            f"data.max_tokens: {data.max_tokens} allows are dropped"
        )
    return kept


def _curriculum(
    entry: CurriculumModel, rows: Sequence[StagedRow], special: SpecialTokens | None
) -> RowCurriculum:
    if entry.method == "icot":
        removal = Removal(**entry.removal.model_dump())
        longest = max(len(row.texts[0]) for row in rows)
        return TokenCurriculum(removal, longest, entry.reset_optimizer)
    latents = entry.latents_per_step if entry.has_latents else 0
    return StepCurriculum(
        Stages(latents, entry.last_latent_stage),
        entry.first_stage,
        entry.steps_per_stage,
        entry.uniform_mix,
        entry.reset_optimizer,
        special,
    )
