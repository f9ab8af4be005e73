"""Latent SFT: self-distillation of chain of thought into latent steps (docs/method.md, section 4).

    loss = CE(teacher) + CE(student) + weighted distances of their hidden states
           [+ loss of a step decoder (SIM-CoT)]

One set of weights reads each row twice: as the teacher, with its reasoning in text, and as the
student, with latent steps in its place; the question before it is read once for both. With a frozen
teacher (`distillation.teacher`) there is no CE(teacher): the teacher's states come from a cache,
and only the student learns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_reasoning.config import Distillation, LatentSftModel, Runtime, StepDecoder
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.examples import LatentExample
from latent_reasoning.model.reading import Reading, sizes_of
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.step_decoder import STEP_LOSS, StepBatch, step_loss
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.parallel import ALONE, OneProcess
from latent_reasoning.sft.distillation import (
    Side,
    StateSummary,
    distillation_losses,
    read_with_states,
)
from latent_reasoning.sft.shared_question import plan_question
from latent_reasoning.sft.teacher import TeacherStates
from latent_reasoning.training.batches import BatchesAhead, BatchPlan
from latent_reasoning.training.task import LossOutput, Planned
from latent_reasoning.training.text import count_labels, cross_entropy

TEACHER_LOSS, STUDENT_LOSS = "teacher_loss", "student_loss"


@dataclass(frozen=True)
class LatentReading:
    """A `collate_latent` batch as it will be read; planned on the host.

    The `question` is read once for both sides; None: each reads its own. There is no `teacher`
    where another one is `frozen`, whose states these are. `steps` is what a step decoder reads.
    """

    question: Reading | None
    teacher: Side | None
    student: Side
    frozen: StateSummary | None
    steps: StepBatch | None = None

    @classmethod
    def plan(
        cls,
        model: LatentReasoner,
        batch: dict[str, Tensor],
        distillation: Distillation,
        frozen: StateSummary | None = None,
        step_texts: Sequence[Sequence[Sequence[int]]] = (),
    ) -> LatentReading:
        """Plan a batch on the host; `frozen` holds the states of a teacher with its own weights,
        `step_texts` the rows' texts for a step decoder."""
        question = teacher = None
        if frozen is None:
            question, batch = plan_question(model, batch)
            continues = question is not None
            with sizes_of(model, "teacher"):
                teacher = Side.plan(model, batch, "teacher", distillation, continues=continues)
        continues = question is not None
        with sizes_of(model, "student"):
            student = Side.plan(model, batch, "student", distillation, continues=continues)
        steps = StepBatch.plan(batch["latent_input_ids"], step_texts, model.settings)
        return cls(question, teacher, student, frozen, steps)


def latent_sft_losses(
    model: LatentReasoner,
    batch: LatentReading,
    distillation: Distillation,
    *,
    stop_label_smoothing: float = 0.0,
    step_decoder: StepDecoder | None = None,
) -> dict[str, Tensor]:
    """The weighted parts of the loss of one batch on the model's device; their sum is the loss.

    The host waits for nothing here, but where texts for the model's step decoder were planned.
    """
    losses: dict[str, Tensor] = {}
    question = None if batch.question is None else model.read(batch.question)
    teacher = batch.frozen
    if batch.teacher is not None:
        output, teacher = read_with_states(model, batch.teacher, distillation, question)
        own_loss = cross_entropy(model, output, batch.teacher.labels)
        losses[TEACHER_LOSS] = distillation.teacher_loss_weight * own_loss
    output, student = read_with_states(model, batch.student, distillation, question)
    labels = batch.student.labels
    losses[STUDENT_LOSS] = cross_entropy(model, output, labels, stop_label_smoothing)
    if teacher is not None and student is not None:
        losses |= distillation_losses(teacher, student, distillation)
    if step_decoder is not None:
        own_loss = step_loss(model, output.last_hidden, batch.steps, step_decoder.normalise)
        losses[STEP_LOSS] = step_decoder.weight * own_loss
    return losses


@dataclass(frozen=True)
class LatentBatch:
    """A planned micro-batch; `scale` holds the factor of each part of its loss, float64
    (token-exact accumulation; 1 for a part that it lacks)."""

    reading: LatentReading
    scale: dict[str, Tensor]


@dataclass
class LatentSftTask:
    """Learn latent reasoning from rows read as teacher and as student."""

    name: str
    model: LatentReasoner
    examples: Sequence[LatentExample]
    entry: LatentSftModel
    runtime: Runtime
    seed: int
    pad_id: int
    validate: Callable[[], dict[str, float]]
    teacher_states: TeacherStates | None = None
    processes: OneProcess = ALONE
    iterations = 1

    def __post_init__(self) -> None:
        training = self.entry.training
        # Without a micro-batch size the loss is one mean, even where several processes share it.
        self.by_tokens = training.accumulation == "tokens" or self.runtime.micro_batch_size is None
        self.plan = BatchPlan(
            [len(example.teacher) + len(example.student) for example in self.examples],
            training,
            self.runtime,
            self.seed,
            self.name,
            by_length=self.by_tokens,
            processes=self.processes,
        )
        self.ahead = BatchesAhead(self._make, self.plan)

    def micro_batches(self, step: int) -> list[Planned]:
        """This process's share of the step's examples, collated and planned."""
        return self.ahead.of(step)

    def prepare(self, step: int) -> None:
        """Make the micro-batches of `step` ready."""
        self.ahead.prepare(step, self.model.device)

    def _make(self, step: int) -> list[Planned]:
        batches = [
            (indices, collate_latent([self.examples[index] for index in indices], self.pad_id))
            for indices in self.plan.micro_batches(step)
        ]
        scales: list[dict[str, Tensor]] = [{} for _ in batches]
        if self.by_tokens and len(batches) > 1:
            scales = token_scales([batch for _, batch in batches])
        return [
            Planned(LatentBatch(self._plan(place, indices, batch), scale), len(indices))
            for place, ((indices, batch), scale) in enumerate(
                self.processes.share(list(zip(batches, scales, strict=True)))
            )
        ]

    def _plan(self, place: int, indices: list[int], batch: dict[str, Tensor]) -> LatentReading:
        """The collated examples in a `place` of a step as they will be read, with the states of a
        frozen teacher."""
        frozen = None if self.teacher_states is None else self.teacher_states.at(indices)
        with sizes_of(self.model, f"micro-batch {place}"):
            distillation = self.entry.distillation
            texts = [self.examples[index].student.step_texts for index in indices]
            return LatentReading.plan(self.model, batch, distillation, frozen, texts)

    def planned(self, micro_batch: Planned) -> Planned | None:
        """The micro-batch as it is; what a step decoder reads has too many shapes."""
        return micro_batch if self.entry.step_decoder is None else None

    def loss(self, micro_batch: Planned) -> LossOutput:
        """The sum of the parts of the loss; each part is a metric too."""
        loss, parts = self.program(to_device(micro_batch.inputs, self.model.device))
        return LossOutput(loss, micro_batch.weight, parts)

    def program(self, inputs: LatentBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `loss`, on the model's device."""
        parts = latent_sft_losses(
            self.model,
            inputs.reading,
            self.entry.distillation,
            stop_label_smoothing=self.entry.stop_label_smoothing,
            step_decoder=self.entry.step_decoder,
        )
        for name in parts.keys() & inputs.scale.keys():
            parts[name] = parts[name] * inputs.scale[name].to(parts[name].dtype)
        return sum(parts.values()), parts


def token_scales(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Factors, for each micro-batch and part, that make the mean over examples exact in tokens.

    The cross-entropies are means over labels; micro-batches are weighted by examples. A factor is
    the micro-batch's share of the step's labels over its share of the step's examples.
    """
    examples = [len(batch["labels"]) for batch in batches]
    scales: list[dict[str, Tensor]] = [{} for _ in batches]
    for part, key in ((TEACHER_LOSS, "labels"), (STUDENT_LOSS, "latent_labels")):
        labels = [count_labels(batch[key]) for batch in batches]
        for scale, own, count in zip(scales, labels, examples, strict=True):
            factor = (own / sum(labels)) / (count / sum(examples))
            scale[part] = torch.tensor(factor, dtype=torch.float64)
    return scales
