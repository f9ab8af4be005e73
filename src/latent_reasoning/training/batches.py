"""Which examples each step of a training reads, and in which micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from latent_reasoning.config import ConfigError, Runtime, Training
from latent_reasoning.data.collation import StepSampler, bucket_by_length
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import page_locked
from latent_reasoning.runtime.parallel import ALONE, OneProcess

T = TypeVar("T")


@dataclass
class BatchPlan:
    """Which examples each micro-batch of a step reads: a function of (seed, step, rollbacks).

    Each epoch's examples are drawn without replacement, and a step's are the same whatever the
    micro-batch size. With `by_length` micro-batches hold examples of similar length, so that little
    is padded. Without it they keep the drawn order: where they are weighted by examples, grouping
    by length would over-weight the tokens of short rows. Without a micro-batch size, a step has one
    micro-batch per process. Raises `ConfigError` where a process would get none.
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


class BatchesAhead(Generic[T]):
    """A step's micro-batches, made while the device still works on the step before.

    `make` makes those of a step from nothing but the plan and the examples.
    """

    def __init__(self, make: Callable[[int], list[T]], plan: BatchPlan) -> None:
        self._make = make
        self._plan = plan
        self._ready: tuple[tuple[int, int, int], list[T]] | None = None

    def of(self, step: int) -> list[T]:
        """The micro-batches of `step`, made now if they are not ready."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] == self._key(step):
            return ready[1]
        return self._make(step)

    def prepare(self, step: int, device: torch.device) -> None:
        """Make those of `step`, in page-locked memory, so that copies do not block the host."""
        batches = self._make(step)
        if device.type == "cuda":
            batches = page_locked(batches)
        self._ready = self._key(step), batches

    def _key(self, step: int) -> tuple[int, int, int]:
        """What micro-batches depend on: a rollback reorders them, a lack of memory halves them."""
        return step, self._plan.rollbacks, self._plan.micro_batch_size
