"""Which examples each step of a training reads, and in which micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from latent_reasoning.config import ConfigError, Runtime, Training
from latent_reasoning.data.collation import StepSampler, bucket_by_length
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.parallel import ALONE, OneProcess


@dataclass
class BatchPlan:
    """Which examples each micro-batch of a step reads: a function of (seed, step, rollbacks).

    A step's examples are drawn without replacement, whatever the micro-batch size. With `by_length`
    micro-batches hold examples of similar length, so that little is padded. Without it they keep
    the drawn order: where they are weighted by examples, grouping by length would over-weight the
    tokens of short rows. Without a micro-batch size, a step has one micro-batch per process. Raises
    `ConfigError` where a process would get none.
    """

    lengths: Sequence[int]
    training: Training
    runtime: Runtime
    seed: int
    name: str
    by_length: bool = field(default=True, kw_only=True)
    processes: OneProcess = field(default=ALONE, kw_only=True)

    def __post_init__(self) -> None:
        self.batch_size = self.training.batch_size
        size = self.runtime.micro_batch_size or self.processes.share_size(self.batch_size)
        self.micro_batch_size = min(size, self.batch_size)
        if -(-self.batch_size // self.micro_batch_size) < self.processes.count:
            raise ConfigError(
                f"runtime.processes: {self.processes.count} processes have no work for each in a "
                f"batch of {self.batch_size} in micro-batches of {self.micro_batch_size}; lower "
                "runtime.micro_batch_size, or it"
            )
        self.reorder(rollbacks=0)

    def reorder(self, rollbacks: int) -> None:
        """Switch to the data order used after `rollbacks` rollbacks."""
        self.rollbacks = rollbacks
        order = seeds.seed_for(self.seed, seeds.DATA_ORDER.format(model=self.name), rollbacks)
        self.sampler = StepSampler(len(self.lengths), self.batch_size, order)

    def limit_micro_batches(self, size: int) -> None:
        """Limit micro-batches to `size` examples from the next step on."""
        self.micro_batch_size = min(self.micro_batch_size, size)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Positions of the examples of each micro-batch of `step`, for all processes."""
        indices = self.sampler.indices(step)
        if not self.by_length:
            size = self.micro_batch_size
            return [indices[first : first + size] for first in range(0, len(indices), size)]
        buckets = bucket_by_length([self.lengths[i] for i in indices], self.micro_batch_size)
        return [[indices[position] for position in bucket] for bucket in buckets]
