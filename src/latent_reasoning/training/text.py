"""Next-token training on text, shared by the base model from scratch and token SFT.

B rows, T positions, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from latent_reasoning.config import Runtime, StepDecoder, Training
from latent_reasoning.data.collation import collate_plain, from_column
from latent_reasoning.data.examples import IGNORED_LABEL, PlainExample
from latent_reasoning.model.heads import Targets, target_log_probabilities
from latent_reasoning.model.passes import SpecialIds
from latent_reasoning.model.reading import Reading, ReasonerOutput, plan_reading, sizes_of
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.step_decoder import STEP_LOSS, StepBatch, step_loss
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.graphs import Sizes
from latent_reasoning.runtime.parallel import ALONE, OneProcess
from latent_reasoning.training.batches import BatchesAhead, BatchPlan
from latent_reasoning.training.task import LossOutput, Planned


@dataclass(frozen=True)
class Labels:
    """What is learned in a batch: the M positions that predict a label, and their targets.

    `counts` (M,) is 0 where a place only makes up the number, and 1 elsewhere; None: 1 everywhere.
    """

    rows: Tensor
    columns: Tensor
    targets: Targets
    counts: Tensor | None = None

    @classmethod
    def of(
        cls,
        labels: Tensor,
        kinds: Tensor,
        special: SpecialIds | None,
        sizes: Sizes | None = None,
    ) -> Labels:
        """From labels `(B, T)`, -100 where nothing is learned, and the positions' `kinds`."""
        learned = labels[:, 1:] != IGNORED_LABEL
        rows, columns = learned.nonzero(as_tuple=True)
        targets = Targets.of(labels[:, 1:][learned], kinds[rows, columns], special)
        if sizes is None:
            return cls(rows, columns, targets)
        places, counts, targets = targets.of_few_shapes(sizes)
        return cls(rows[places], columns[places], targets, counts)

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of the labels' losses (M,)."""
        if self.counts is None:
            return losses.mean()
        counts = self.counts.to(losses.dtype)
        return (losses * counts).sum() / counts.sum()


def cross_entropy(
    model: LatentReasoner,
    output: ReasonerOutput,
    labels: Labels,
    stop_label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of the next token over the labels.

    Logits are computed at labelled positions only. `stop_label_smoothing` is the probability mass
    that moves to the opposite stop decision at START and CONTINUE positions.
    """
    hidden, targets = output.last_hidden[labels.rows, labels.columns], labels.targets
    losses = -target_log_probabilities(model, hidden, targets)
    if stop_label_smoothing:
        losses = _smooth_stop_labels(model, hidden, targets, losses, stop_label_smoothing)
    return labels.mean(losses)


def _smooth_stop_labels(
    model: LatentReasoner, hidden: Tensor, targets: Targets, losses: Tensor, smoothing: float
) -> Tensor:
    """Mix in the loss of the opposite decision where the next token is a stop decision."""
    thinking, settings = targets.thinking, model.settings
    others = settings.continue_id + settings.stop_id - targets.tokens[thinking]
    other_losses = -target_log_probabilities(model, hidden[thinking], targets.decisions(others))
    return losses.index_add(0, thinking, smoothing * (other_losses - losses[thinking]))


def count_labels(labels: Tensor) -> int:
    """The number of labels `(B, T)` that are learned; nothing predicts the first position."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


SPEED_MICRO_BATCH = 16
"""On a CPU, passes of 16 rows of similar length take 0.6 times as long as one pass of 64 rows
padded to the longest (laptop's base model)."""


@dataclass(frozen=True)
class TextBatch:
    """A micro-batch as it will be read, what is learned in it, and what a step decoder reads."""

    reading: Reading
    labels: Labels
    steps: StepBatch | None = None


@dataclass
class TextTask:
    """Learn the labels of text examples.

    With a `step_decoder`, each of an example's `step_texts` belongs to `latents_per_text` latent
    inputs.
    """

    name: str
    model: LatentReasoner
    examples: Sequence[PlainExample]
    training: Training
    runtime: Runtime
    seed: int
    pad_id: int
    validate: Callable[[], dict[str, float]]
    processes: OneProcess = ALONE
    step_decoder: StepDecoder | None = None
    latents_per_text: int = 1
    iterations = 1

    def __post_init__(self) -> None:
        # A whole batch may be cut for speed: weighted by labels, the loss is still its mean. With a
        # step decoder it is not cut: that loss is no mean over labels.
        runtime, whole = self.runtime, self.runtime.micro_batch_size is None
        if whole and self.model.device.type == "cpu" and self.step_decoder is None:
            size = min(SPEED_MICRO_BATCH, self.processes.share_size(self.training.batch_size))
            runtime = runtime.model_copy(update={"micro_batch_size": size})
        self.by_tokens = whole or self.training.accumulation == "tokens"
        self.plan = BatchPlan(
            [len(example) for example in self.examples],
            self.training,
            runtime,
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
        return [
            self._planned(place, indices, [self.example(step, index) for index in indices])
            for place, indices in enumerate(self.processes.share(self.plan.micro_batches(step)))
        ]

    def example(self, step: int, index: int) -> PlainExample:
        """What is read of an example at a step, whichever it is."""
        return self.examples[index]

    def _planned(self, place: int, indices: list[int], examples: Sequence[PlainExample]) -> Planned:
        """The micro-batch in a `place` of a step."""
        sizes = self.model.sizes
        with sizes_of(self.model, f"micro-batch {place}"):
            batch = collate_plain(examples, self.pad_id)
            weight = count_labels(batch["labels"]) if self.by_tokens else len(indices)
            if sizes is not None:
                begin, width = batch["attention_mask"].argmax(1), batch["input_ids"].shape[1]
                batch = from_column(batch, batch, begin, sizes("text", width))
            reading = plan_reading(self.model, batch["input_ids"], batch["attention_mask"])
            labels = Labels.of(batch["labels"], reading.kinds, self.model.settings, sizes)
            steps = None
            if self.step_decoder is not None:
                texts = [example.step_texts for example in examples]
                special, group = self.model.settings, self.latents_per_text
                steps = StepBatch.plan(batch["input_ids"], texts, special, group)
            return Planned(TextBatch(reading, labels, steps), weight)

    def planned(self, micro_batch: Planned) -> Planned | None:
        """The micro-batch as it is; what a step decoder reads has too many shapes."""
        return micro_batch if self.step_decoder is None else None

    def loss(self, micro_batch: Planned) -> LossOutput:
        """Mean cross-entropy over the micro-batch's labels, and the loss of a step decoder."""
        loss, parts = self.program(to_device(micro_batch.inputs, self.model.device))
        return LossOutput(loss, micro_batch.weight, parts)

    def program(self, inputs: TextBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `loss`, on the model's device."""
        output = self.model.run(inputs.reading)
        loss = cross_entropy(self.model, output, inputs.labels)
        if self.step_decoder is None:
            return loss, {}
        own_loss = self.step_decoder.weight * step_loss(
            self.model, output.last_hidden, inputs.steps, self.step_decoder.normalise
        )
        return loss + own_loss, {STEP_LOSS: own_loss}
