"""The gradient of a step, each micro-batch given out kernel by kernel or captured.

On a GPU the host takes longer to give out the kernels of a latent step than the GPU to run them.
There a micro-batch's loss and gradient are one program, captured as a CUDA graph for each of a few
shapes (`runtime/graphs.py`); the optimiser's step stays outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from latent_reasoning.config import Runtime
from latent_reasoning.model.decoding import can_be_captured
from latent_reasoning.model.projection import weights_cast_once
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.graphs import Captured, Programs, Sizes
from latent_reasoning.runtime.memory import memory_shortage
from latent_reasoning.training.checkpoints import parameter_names
from latent_reasoning.training.task import Task

Values = dict[str, float | Tensor]
"""Metrics by name, as numbers or as scalars that are still on the device."""


SEEN_BEFORE = 64
"""Steps whose batches are planned before the first, so that sizes have grown to what is usual."""


class Backward:
    """Adds the gradient of a task's micro-batches to that of its model."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, micro_batch: Any, *, whole: bool) -> tuple[float, Values]:
        """Add the gradient of one, times its weight unless it is the `whole` step.

        Returns weight and metrics. The total weight is known only at the end of a step, where the
        gradient is divided by it.
        """
        with weights_cast_once():
            output = self.task.loss(micro_batch)
        (output.loss if whole else output.loss * output.weight).backward()
        return output.weight, {"loss": output.loss.detach()} | output.metrics

    def zero_gradients(self) -> None:
        """Begin a step."""
        self.task.model.zero_grad()

    def forget(self) -> None:
        """Free what is held from step to step."""
        self.task.model.zero_grad()


class CapturedBackward(Backward):
    """The same by captured programs, which add to gradients that stay where they are."""

    def __init__(self, task: Task, device: torch.device, log: Callable[[str], None]) -> None:
        """`task` trains a `LatentReasoner` that `can_be_captured`."""
        super().__init__(task)
        self._device, self._log = device, log
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self.forget()

    def __call__(self, micro_batch: Any, *, whole: bool) -> tuple[float, Values]:
        """As `Backward`; a micro-batch that cannot be captured is worked on without."""
        planned = self.task.planned(micro_batch)
        if planned is None:
            return super().__call__(micro_batch, whole=whole)
        factor = torch.tensor(1.0 if whole else planned.weight)
        values = self._programs((planned.inputs, factor))
        return planned.weight, {n: v.clone() for n, v in values.items()} | planned.metrics

    def shapes(self) -> int:
        """The number of captured programs."""
        return len(self._programs)

    def zero_gradients(self) -> None:
        """Set them to 0 where they are."""
        self.task.model.zero_grad()
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        if self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))

    def forget(self) -> None:
        """Free gradients and graphs, those of decoding too."""
        self.task.model.zero_grad()
        self.task.model.captured.clear()
        self._gradients.clear()
        self._programs = Programs(self._program, self._device, around=self._without_a_trace)

    def _program(self, given: tuple[Any, Tensor]) -> dict[str, Tensor]:
        inputs, factor = given
        with weights_cast_once():
            loss, metrics = self.task.program(inputs)
        (loss * factor).backward()
        return {name: value.detach() for name, value in ({"loss": loss} | metrics).items()}

    def _without_a_trace(self, capture: Callable[[], Captured[Any]]) -> Captured[Any]:
        """A capture runs the program: afterwards the gradients are as they were before."""
        before = {p: p.grad.clone() for p in parameter_names(self.task.model) if p.grad is not None}
        program = capture()
        for parameter in parameter_names(self.task.model):
            if parameter.grad is None:
                continue
            self._gradients[parameter] = parameter.grad
            if parameter in before:
                parameter.grad.copy_(before[parameter])
            else:
                parameter.grad.zero_()
        count = len(self._programs) + 1
        if count & (count - 1) == 0:  # 1, 2, 4, ..: a short log
            self._log(f"{self.task.name}: {count} shape{'s' if count > 1 else ''} captured")
        return program


def backward_of(task: Task, runtime: Runtime, log: Callable[[str], None]) -> Backward:
    """How the gradients of a task are computed; says so where a GPU cannot capture them.

    Batches of a model whose steps are captured are planned in few shapes from then on.
    """
    model, device = task.model, next(task.model.parameters()).device
    if not isinstance(model, LatentReasoner):
        return Backward(task)
    model.captured.when = runtime.cuda_graphs
    model.compiled = runtime.compile and device.type == "cuda"
    if not model.captured.wanted_on(device):
        return Backward(task)
    if not can_be_captured(model):
        log(f"{task.name}: only steps of a Llama are captured as CUDA graphs: runs without them")
        return Backward(task)
    model.sizes = Sizes()
    for step in range(SEEN_BEFORE):
        task.prepare(step)
    return CapturedBackward(task, device, log)


def accumulate_gradients(
    model: nn.Module,
    task: Task,
    step: int,
    max_grad_norm: float | None = None,
    backward: Backward | None = None,
) -> dict[str, float]:
    """Gradient of the weighted mean loss over the step's micro-batches, and its metrics.

    Both cover the micro-batches of all processes. With `max_grad_norm` the gradient is clipped to
    it, and the metrics have its norm before that, `gradient_norm`. The host waits for the device
    once, for the metrics, after all its work has been given out (and with several processes, once
    more for what they tell each other). Raises `OutOfMemoryError` on all processes where memory
    does not suffice on one.
    """
    processes, backward = task.processes, backward or Backward(task)
    outputs: list[tuple[float, Values]] = []
    with memory_shortage(processes):
        micro_batches = task.micro_batches(step)
        whole = processes.count == 1 and len(micro_batches) == 1
        outputs += [backward(micro_batch, whole=whole) for micro_batch in micro_batches]
    if processes.count > 1:
        numbers = _numbers([values for _, values in outputs])
        weights = (weight for weight, _ in outputs)
        outputs = processes.gather(list(zip(weights, numbers, strict=True)))
    trained = list(parameter_names(model))
    processes.sum_gradients(trained)
    total = sum(weight for weight, _ in outputs)
    if not whole:
        gradients = [p.grad for p in trained if p.grad is not None]
        torch._foreach_div_(gradients, total)
    norm: Values = {}
    if max_grad_norm is not None:
        norm["gradient_norm"] = nn.utils.clip_grad_norm_(trained, max_grad_norm)
    if next(model.parameters()).device.type != "cpu":
        task.prepare(step + 1)
    *values, norms = _numbers([*(values for _, values in outputs), norm])
    pairs = [(weight, own) for (weight, _), own in zip(outputs, values, strict=True)]
    return weighted_means(pairs) | norms


def weighted_means(outputs: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Means of the metrics of weighted micro-batches, each over those that have it."""
    names = dict.fromkeys(name for _, values in outputs for name in values)
    share = {name: [(w, v[name]) for w, v in outputs if name in v] for name in names}
    return {
        name: sum(w * v for w, v in pairs) / (sum(w for w, _ in pairs) or 1.0)
        for name, pairs in share.items()
    }


def _numbers(parts: list[Values]) -> list[dict[str, float]]:
    """The same with plain floats, by one transfer from the device."""
    scalars = [value for values in parts for value in values.values() if isinstance(value, Tensor)]
    stacked = torch.stack([scalar.detach().double() for scalar in scalars]) if scalars else None
    numbers = iter([] if stacked is None else stacked.tolist())
    return [
        {
            name: next(numbers) if isinstance(value, Tensor) else float(value)
            for name, value in values.items()
        }
        for values in parts
    ]
