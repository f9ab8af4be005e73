"""The one training loop that every stage shares.

A stage describes what is trained as a `Task`: the micro-batches of a step, their loss, and the
greedy validation. The loop owns the rest: AdamW with decay groups, schedule, accumulation,
clipping, validation with selection of the best weights, early stop, checkpoints, metrics and
progress lines.

Everything random in step `s` is a function of (seed, s, rollbacks): a task draws its data that way,
and torch's generator (dropout) is seeded anew at each step. A training that was killed and resumes
from its last checkpoint therefore ends, on CPU, with bitwise the same weights as an uninterrupted
one. A rollback takes a diverging training back to its last good checkpoint, from where it continues
with other random numbers (`divergence.py`).

With several processes, each runs this loop over its share of every step's micro-batches
(`runtime/parallel.py`); only the first one writes checkpoints and metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latent_reasoning.config import Runtime, Training
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import autocast, resolve_precision
from latent_reasoning.runtime.memory import OutOfMemoryError, memory_shortage, release
from latent_reasoning.runtime.signals import StopRequest, TrainingInterruptedError
from latent_reasoning.runtime.tracking import Tracker
from latent_reasoning.training.checkpoints import CheckpointStore, Progress, parameter_names
from latent_reasoning.training.divergence import DivergenceError, DivergenceGuard, Trouble, describe
from latent_reasoning.training.metrics import MetricsLog, ProgressLines
from latent_reasoning.training.optimiser import build_optimizer, learning_rate
from latent_reasoning.training.task import Task


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training; the model holds the weights of `step`."""

    step: int
    steps_run: int
    validation_accuracy: float | None
    validation_reasoning_tokens: float | None
    metrics: Path
    selection: str
    rollbacks: list[dict[str, Any]]


@dataclass
class Trainer:
    """One training: what is trained, how, and where its checkpoints are.

    `seed` determines everything random in its steps; metrics, each the mean of `log_every` steps,
    go to `tracker` too; `stop` says when to end early.
    """

    task: Task
    training: Training
    runtime: Runtime
    store: CheckpointStore
    seed: int
    tracker: Tracker = field(default_factory=Tracker)
    log_every: int = 10
    stop: StopRequest = field(default_factory=StopRequest)
    progress: Progress = field(init=False)
    metrics: MetricsLog = field(init=False)
    lines: ProgressLines = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.model = self.task.name, self.task.model
        self.processes, self.log = self.task.processes, self.store.log
        device = next(self.model.parameters()).device
        precision = resolve_precision(self.runtime.precision, device)
        self.autocast = partial(autocast, device, precision)
        self.optimizer = build_optimizer(self.model, self.training)
        self.rate = learning_rate(self.training)
        self.guard = DivergenceGuard(self.runtime.guard, self.training.max_grad_norm)

    def run(self) -> TrainResult:
        """Train the task's model in place, or resume where a killed training stopped.

        At the end the model has the selected weights. Raises `DivergenceError` where the training
        diverges and rollbacks do not help; where `stop` asks for it, writes a checkpoint and raises
        `TrainingInterruptedError`.
        """
        self._resume()
        while not self.progress.finished:
            trouble, improved = self._step(), False
            if trouble is None and self._is_due(self.training.validate_every):
                trouble, improved = self._validate()
            if trouble is None:
                self._save(improved)
            else:
                self._go_back(trouble)
        self.metrics.close()
        self.processes.wait()
        return self._select()

    def _resume(self) -> None:
        """Load the last checkpoint; without one, save the start, which the guard may go back to."""
        with self.processes.main_first():
            self.progress = self.store.resume(self.model, self.optimizer) or Progress()
        self.processes.broadcast(parameter_names(self.model))
        progress, is_main = self.progress, self.processes.is_main
        if progress.step:
            self.log(f"{self.name}: resumes after step {progress.step}")
        if progress.micro_batch_size is not None:
            self.task.plan.limit_micro_batches(progress.micro_batch_size)
        path = self.store.folder / "metrics.jsonl"
        self.metrics = MetricsLog(path, progress, self.tracker, writes=is_main)
        self.lines = ProgressLines(self.name, self.training.steps, progress.step, self.log)
        progress.finished = progress.finished or self.training.steps == 0
        start_needed = self.runtime.guard.enabled and not progress.finished
        if start_needed and not self.store.steps() and is_main:
            self.store.save(self.model, self.optimizer, progress)
        self.processes.wait()

    def _step(self) -> Trouble | None:
        """Take one optimiser step, unless its loss or gradient shows trouble."""
        progress = self.progress
        rollbacks = len(progress.guard.rollbacks)
        self.task.plan.reorder(rollbacks)
        rate = self.rate(progress.step) * self.guard.rate_factor(rollbacks)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.model.train()
        values = self._gradients_within_memory()
        trouble = self.guard.judge_step(progress.guard, progress.step, values)
        if trouble is not None:
            return trouble
        self.optimizer.step()
        values["learning_rate"] = rate
        progress.step += 1
        self.metrics.add(values)
        if self._is_due(self.log_every):
            self.lines.loss(progress.step, self.metrics.flush())
        return None

    def _is_due(self, every: int) -> bool:
        """Whether an action due every `every` steps and after the last one is due now."""
        return self.progress.step % every == 0 or self.progress.step == self.training.steps

    def _gradients_within_memory(self) -> dict[str, float]:
        """`accumulate_gradients`, halving the micro-batch as often as memory does not suffice.

        The whole step is computed again with the smaller micro-batch. `Progress` keeps the size, so
        that it holds for all later steps, also after a kill.
        """
        progress, plan = self.progress, self.task.plan
        rollbacks = len(progress.guard.rollbacks)
        purpose = self.processes.purpose(seeds.STEP.format(model=self.name, step=progress.step))
        step_seed = seeds.seed_for(self.seed, purpose, rollbacks)
        while True:
            torch.manual_seed(step_seed)
            self.model.zero_grad()
            try:
                with self.autocast():
                    return accumulate_gradients(
                        self.model, self.task, progress.step, self.training.max_grad_norm
                    )
            except OutOfMemoryError as error:
                reason = str(error)
            size = plan.micro_batch_size
            if size == 1:
                raise OutOfMemoryError(
                    f"{self.name}: out of memory with a single example ({reason}): give the job "
                    "more memory, set runtime.precision to bfloat16 (on a GPU), train an adapter "
                    "(lora), or lower data.max_tokens or (RL) group_size"
                )
            plan.limit_micro_batches(size // 2)
            progress.micro_batch_size = size // 2
            self.model.zero_grad()
            release()
            self.log(
                f"warning: {self.name}: out of memory at step {progress.step + 1} with "
                f"micro-batches of {size}, continues with {size // 2}; the batch stays the same "
                f"({reason})"
            )

    def _validate(self) -> tuple[Trouble | None, bool]:
        """Validate; returns the trouble it shows, if any, and whether to save these weights as the
        best so far."""
        progress = self.progress
        self.model.eval()
        with torch.no_grad(), self.autocast():
            measured = dict(self.task.validate())
        rows = measured.pop("validation_rows", None)
        self.metrics.write(measured)
        self.lines.validation(progress.step, measured)
        accuracy = measured.get("validation_accuracy")
        trouble = self.guard.judge_validation(progress.guard, progress.step, accuracy, rows)
        if trouble is not None:
            return trouble, False
        return None, _note_accuracy(self.training, progress, measured)

    def _save(self, improved: bool) -> None:
        """Write a checkpoint where one is due; end after it where the training was asked to end."""
        progress = self.progress
        due = improved or progress.finished or progress.step % self.runtime.checkpoint_every == 0
        reason = self._interruption()
        if (due or reason) and self.processes.is_main:
            self.store.save(self.model, self.optimizer, progress)
        if reason:
            self.metrics.close()
            self.processes.wait()
            raise TrainingInterruptedError(
                f"{self.name}: {reason}: ended with a checkpoint; resumes from step "
                f"{progress.step} of {self.training.steps} when run again"
            )

    def _interruption(self) -> str | None:
        """Why the training is to end after this step; None on all processes where it continues."""
        if self.progress.finished or self.progress.step % self.task.iterations:
            return None
        reason = self.stop.reason
        if not self.processes.any_rank(reason is not None):
            return None
        return reason or "another process was asked to end"

    def _go_back(self, trouble: Trouble) -> None:
        """Load the last checkpoint from before the trouble, and record the rollback in it."""
        progress = self.progress
        self.guard.check_patience(self.name, progress.guard, trouble)
        with self.processes.main_first():
            earlier = self.store.resume(self.model, self.optimizer, until=trouble.good_until)
        if earlier is None:
            raise DivergenceError(
                f"{trouble.reason}: the training diverged, and no checkpoint from before is left "
                f"in {self.store.folder}; remove the folder to train afresh"
            )
        rollbacks = self.guard.record(progress.guard, trouble, progress.step, earlier.step)
        earlier.guard.rollbacks = rollbacks
        earlier.micro_batch_size = progress.micro_batch_size
        self.processes.wait()
        if self.processes.is_main:
            self.store.restart_from(earlier)
        self.progress = earlier
        self.metrics.rewind(earlier)
        self.metrics.write({"rollbacks": len(rollbacks)})
        self.log(f"warning: {self.name}: diverged: {describe(rollbacks[-1])}")

    def _select(self) -> TrainResult:
        """Put the selected weights into the model."""
        progress = self.progress
        if self.training.select == "last" or progress.best_step is None:
            selection = f"the last step ({progress.step})"
        else:
            self.store.load_weights(progress.best_step, self.model)
            selection = (
                f"step {progress.best_step} of {progress.step}: highest greedy accuracy on the "
                "validation rows; among equals the shortest reasoning, then the earliest step"
            )
        self.model.eval()
        return TrainResult(
            step=progress.best_step if progress.best_step is not None else progress.step,
            steps_run=progress.step,
            validation_accuracy=progress.best_accuracy,
            validation_reasoning_tokens=progress.best_length,
            metrics=self.metrics.path,
            selection=selection,
            rollbacks=progress.guard.rollbacks,
        )


# ------------------------------------------------------------------------------ one step's parts


def accumulate_gradients(
    model: nn.Module, task: Task, step: int, max_grad_norm: float | None = None
) -> dict[str, float]:
    """Gradient of the weighted mean loss over the step's micro-batches, and its metrics.

    Both cover the micro-batches of all processes. With `max_grad_norm` the gradient is clipped to
    it, and the metrics have its norm before that, `gradient_norm`. The host waits for the device
    once, for the metrics, after all its work has been given out (and with several processes, once
    more for what they tell each other). Raises `OutOfMemoryError` on all processes where memory
    does not suffice on one.
    """
    processes = task.processes
    outputs: list[tuple[float, Values]] = []
    with memory_shortage(processes):
        micro_batches = task.micro_batches(step)
        whole = processes.count == 1 and len(micro_batches) == 1
        for micro_batch in micro_batches:
            output = task.loss(micro_batch)
            # The total weight is known only at the end, where the gradient is divided by it.
            (output.loss if whole else output.loss * output.weight).backward()
            outputs.append((output.weight, {"loss": output.loss.detach()} | output.metrics))
    if processes.count > 1:
        numbers = _numbers([values for _, values in outputs])
        weights = (weight for weight, _ in outputs)
        outputs = processes.gather(list(zip(weights, numbers, strict=True)))
    processes.sum_gradients(parameter_names(model))
    total = sum(weight for weight, _ in outputs)
    if not whole:
        gradients = [p.grad for p in parameter_names(model) if p.grad is not None]
        torch._foreach_div_(gradients, total)
    norm: Values = {}
    if max_grad_norm is not None:
        trained = list(parameter_names(model))
        norm["gradient_norm"] = nn.utils.clip_grad_norm_(trained, max_grad_norm)
    if next(model.parameters()).device.type != "cpu":
        task.prepare(step + 1)
    *values, norms = _numbers([*(values for _, values in outputs), norm])
    pairs = [(weight, own) for (weight, _), own in zip(outputs, values, strict=True)]
    return _weighted_means(pairs) | norms


Values = dict[str, float | Tensor]
"""Metrics by name, as numbers or as scalars that are still on the device."""


def _weighted_means(outputs: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
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


# ------------------------------------------------------------------------------------- selection


def _note_accuracy(training: Training, progress: Progress, values: dict[str, float]) -> bool:
    """Record whether training is over; returns whether to save these weights as the best."""
    progress.finished = progress.step >= training.steps
    accuracy = values.get("validation_accuracy")
    if accuracy is None:
        return False
    enough = training.stop_at_accuracy is not None and accuracy >= training.stop_at_accuracy
    progress.finished = progress.finished or enough
    length = values.get("validation_reasoning_tokens")
    improved = progress.best_step is None or _rank(accuracy, length) > _rank(
        progress.best_accuracy, progress.best_length
    )
    if improved or training.select == "last":
        progress.best_step, progress.best_accuracy = progress.step, accuracy
        progress.best_length = length
    return improved and training.select == "best"


def _rank(accuracy: float, length: float | None) -> tuple[float, float]:
    """Higher accuracy is better; at equal accuracy, shorter reasoning."""
    return accuracy, -(length or 0.0)
