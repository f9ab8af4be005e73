"""What a stage trains, as the loop sees it: micro-batches, their loss, validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from latent_reasoning.runtime.parallel import OneProcess


@dataclass(frozen=True)
class LossOutput:
    """Loss of one micro-batch.

    `loss` is a mean and `weight` what it counts for in the step, whose loss is the weighted mean
    over its micro-batches; `metrics` (numbers or scalar tensors) are averaged in the same way.
    """

    loss: Tensor
    weight: float
    metrics: dict[str, float | Tensor] = field(default_factory=dict)


class Plan(Protocol):
    """Which data each step of a task reads, in which pieces."""

    micro_batch_size: int
    """Examples a micro-batch."""

    def reorder(self, rollbacks: int) -> None:
        """Switch to the data order used after `rollbacks` rollbacks."""

    def limit_micro_batches(self, size: int) -> None:
        """Cut micro-batches to at most `size` examples: memory does not suffice for more."""


class Task(Protocol):
    """What a stage trains: its model, data, loss and validation."""

    name: str

    model: nn.Module

    iterations: int
    """Consecutive steps on the same samples, between which no checkpoint may fall."""

    plan: Plan

    processes: OneProcess
    """The processes that share each step's micro-batches."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """This process's micro-batches of optimiser step `step` (from 0), a function of `step`.

        Of all processes' micro-batches, `processes.share` gives each its own.
        """

    def loss(self, micro_batch: Any) -> LossOutput:
        """Loss of one micro-batch, with its graph."""

    def validate(self) -> dict[str, float]:
        """Greedy `validation_accuracy`, `validation_reasoning_tokens`, ..; or nothing at all.

        `validation_rows`, how many rows these are means of, is not logged.

        All processes call it, and get the same values.
        """
