"""What a stage trains, as the training loop sees it: micro-batches, their loss, validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from latent_reasoning.runtime.parallel import OneProcess
from latent_reasoning.training.batches import BatchPlan


@dataclass(frozen=True)
class LossOutput:
    """Loss of one micro-batch.

    The loss of a step is the mean of `loss` over its micro-batches, weighted by `weight`; `metrics`
    (numbers or scalar tensors) are averaged in the same way.
    """

    loss: Tensor
    weight: float
    metrics: dict[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A micro-batch of which a device can compute loss and gradient without the host.

    `inputs` holds all tensors that the loss is computed from, in frozen dataclasses, lists and
    dicts, on the host or the device; shapes and whatever else decides which kernels run depend on
    it alone. `weight` and `metrics` are what the host knows already of the micro-batch's
    `LossOutput`.
    """

    inputs: Any
    weight: float
    metrics: dict[str, float] = field(default_factory=dict)


class Task(Protocol):
    """What a stage trains: its model, data, loss and validation."""

    name: str

    model: nn.Module

    iterations: int
    """Number of consecutive steps on the same samples; no checkpoint falls between them."""

    plan: BatchPlan
    """Which data each step reads."""

    processes: OneProcess
    """The processes that share each step's micro-batches."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """This process's micro-batches of optimiser step `step` (from 0), a function of `step`.

        `processes.share` selects them from the micro-batches of all processes.
        """

    def prepare(self, step: int) -> None:
        """Make ready of `step` what does not depend on the weights, if anything.

        Called while the device still works on the step before.
        """

    def loss(self, micro_batch: Any) -> LossOutput:
        """Loss of one micro-batch, with its graph."""

    def planned(self, micro_batch: Any) -> Planned | None:
        """The micro-batch for `program`; None where its loss cannot be captured."""

    def program(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of planned inputs that are on the device; the host waits for nothing."""

    def validate(self) -> dict[str, float]:
        """Greedy `validation_accuracy`, `validation_reasoning_tokens`, ..; may be empty.

        `validation_rows`, the number of rows that these are means over, is not logged. All
        processes call this and get the same values.
        """
