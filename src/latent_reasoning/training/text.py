"""Next-token training on text: what pretraining of the base and token SFT share.

B rows, T positions, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from latent_reasoning.config import ConfigError, Runtime, Training
from latent_reasoning.data.collation import StepSampler, bucket_by_length, collate_plain
from latent_reasoning.data.examples import IGNORED_LABEL, PlainExample
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner, ReasonerOutput
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.parallel import current
from latent_reasoning.training.loop import LossOutput


def cross_entropy(
    model: LatentReasoner,
    output: ReasonerOutput,
    labels: Tensor,
    stop_label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy of the next token over the labels `(B, T)` that are not -100.

    Logits are computed at labelled positions alone. `stop_label_smoothing` is the mass that moves
    to the other of the two stop decisions at START and CONTINUE positions.
    """
    learned = labels[:, 1:] != IGNORED_LABEL
    rows, columns = (index.to(model.device) for index in learned.nonzero(as_tuple=True))
    targets = labels[:, 1:][learned].to(model.device)
    hidden, kinds = output.last_hidden[rows, columns], output.kinds[rows, columns]
    losses = -model.target_log_probabilities(hidden, kinds, targets)
    if stop_label_smoothing:
        losses = _smooth_stop_labels(model, hidden, kinds, targets, losses, stop_label_smoothing)
    return losses.mean()


def _smooth_stop_labels(
    model: LatentReasoner,
    hidden: Tensor,
    kinds: Tensor,
    targets: Tensor,
    losses: Tensor,
    smoothing: float,
) -> Tensor:
    """Mix in the loss of the other decision where the next token is one."""
    thinking = (kinds == Kind.THINKING).nonzero()[:, 0]
    settings = model.settings
    others = settings.continue_id + settings.stop_id - targets[thinking]
    other_losses = -model.target_log_probabilities(hidden[thinking], kinds[thinking], others)
    return losses.index_add(0, thinking, smoothing * (other_losses - losses[thinking]))


def count_labels(labels: Tensor) -> int:
    """Labels `(B, T)` that are learned; the first position predicts nothing before it."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())


class BatchPlan:
    """Which examples each micro-batch of a step reads: a function of (seed, step, rollbacks).

    A step's examples are a draw without replacement, whatever the micro-batch size. Micro-batches
    hold examples of like length where `by_length`, so that little is padded. Where each micro-batch
    counts by its examples that would favour the words of short ones: there they stay as drawn.
    Without a micro-batch size a step has one for each process. Raises `ConfigError` where a process
    would get none.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        training: Training,
        runtime: Runtime,
        seed: int,
        name: str,
        *,
        by_length: bool = True,
    ) -> None:
        self.lengths = lengths
        self.batch_size = training.batch_size
        self.seed = seed
        self.name = name
        self.by_length = by_length
        share = current().share_size(training.batch_size)
        self.micro_batch_size = min(runtime.micro_batch_size or share, training.batch_size)
        if -(-training.batch_size // self.micro_batch_size) < current().count:
            raise ConfigError(
                f"runtime.processes: {current().count} processes have no work for each in a batch "
                f"of {training.batch_size} in micro-batches of {self.micro_batch_size}; lower "
                "runtime.micro_batch_size, or it"
            )
        self.reorder(rollbacks=0)

    def reorder(self, rollbacks: int) -> None:
        """Draw in the order that belongs to a training after so many rollbacks."""
        self.rollbacks = rollbacks
        order = seeds.seed_for(self.seed, seeds.DATA_ORDER.format(model=self.name), rollbacks)
        self.sampler = StepSampler(len(self.lengths), self.batch_size, order)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Positions of the examples of each micro-batch of `step`, of all processes."""
        indices = self.sampler.indices(step)
        if not self.by_length:
            size = self.micro_batch_size
            return [indices[first : first + size] for first in range(0, len(indices), size)]
        buckets = bucket_by_length([self.lengths[i] for i in indices], self.micro_batch_size)
        return [[indices[position] for position in bucket] for bucket in buckets]


SPEED_MICRO_BATCH = 16
"""On a CPU, passes of 16 rows of like length take 0.6 times as long as one of 64 that is padded to
the longest (laptop's base model)."""


@dataclass(frozen=True)
class TextBatch:
    """A collated micro-batch and what it counts for in its step."""

    tensors: dict[str, Tensor]
    weight: float


class TextTask:
    """Learn the labels of text examples."""

    iterations = 1

    def __init__(
        self,
        name: str,
        model: LatentReasoner,
        examples: Sequence[PlainExample],
        training: Training,
        runtime: Runtime,
        *,
        seed: int,
        pad_id: int,
        validate: Callable[[], dict[str, float]],
    ) -> None:
        self.name = name
        self.model = model
        self.examples = examples
        # A whole batch may be cut for speed; weighted by labels its loss remains the batch's mean.
        whole = runtime.micro_batch_size is None
        if whole and model.device.type == "cpu":
            size = min(SPEED_MICRO_BATCH, current().share_size(training.batch_size))
            runtime = runtime.model_copy(update={"micro_batch_size": size})
        self.by_tokens = whole or training.accumulation == "tokens"
        self.pad_id = pad_id
        self.validate = validate
        lengths = [len(example) for example in examples]
        self.plan = BatchPlan(lengths, training, runtime, seed, name, by_length=self.by_tokens)

    def micro_batches(self, step: int) -> list[TextBatch]:
        """This process's share of the step's examples, collated."""
        own = current().share(self.plan.micro_batches(step))
        return [self._collate(indices) for indices in own]

    def loss(self, micro_batch: TextBatch) -> LossOutput:
        """Mean cross-entropy over the labels."""
        batch = micro_batch.tensors
        output = self.model(batch["input_ids"], batch["attention_mask"])
        loss = cross_entropy(self.model, output, batch["labels"])
        return LossOutput(loss, micro_batch.weight)

    def _collate(self, indices: list[int]) -> TextBatch:
        batch = collate_plain([self.examples[index] for index in indices], self.pad_id)
        weight = count_labels(batch["labels"]) if self.by_tokens else len(indices)
        return TextBatch(batch, weight)
