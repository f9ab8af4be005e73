"""The one training loop that every stage shares.

A stage describes what is trained as a `Task`: the micro-batches of a step, their loss, and the
greedy validation. The loop owns the rest: AdamW with decay groups, schedule, accumulation,
clipping, validation with selection of the best weights, early stop, checkpoints, metrics and
progress lines. Where a task has a curriculum (`curriculum.py`), the stage of the last step is part
of a checkpoint.

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

from latent_reasoning.config import Runtime, Training
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import autocast, resolve_precision
from latent_reasoning.runtime.memory import OutOfMemoryError, release
from latent_reasoning.runtime.signals import StopRequest, TrainingInterruptedError
from latent_reasoning.runtime.tracking import Tracker
from latent_reasoning.training.checkpoints import CheckpointStore, Progress, parameter_names
from latent_reasoning.training.curriculum import Curriculum
from latent_reasoning.training.divergence import DivergenceError, DivergenceGuard, Trouble, describe
from latent_reasoning.training.gradients import accumulate_gradients, backward_of
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
        self.backward = backward_of(self.task, self.runtime, self.log)
        self.optimizer = build_optimizer(
            self.model, self.training, getattr(self.task, "learning_rates", None)
        )
        self.rate = learning_rate(self.training)
        self.guard = DivergenceGuard(self.runtime.guard, self.training.max_grad_norm)
        self.curriculum: Curriculum | None = getattr(self.task, "curriculum", None)

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
        self._warn_of_accuracy()
        return self._select()

    def _resume(self) -> None:
        """Load the last checkpoint; without one, save the start, which the guard may go back to."""
        with self.processes.main_first():
            progress = self.store.resume(self.model, self.optimizer) or Progress()
        self.processes.broadcast(parameter_names(self.model))
        self._continue_from(progress)
        is_main = self.processes.is_main
        if progress.step:
            self.log(f"{self.name}: resumes after step {progress.step}")
        if progress.micro_batch_size is not None:
            self.task.plan.limit_micro_batches(progress.micro_batch_size)
        path = self.store.folder / "metrics.jsonl"
        self.metrics = MetricsLog(path, progress, self.tracker, writes=is_main)
        progress.finished = progress.finished or self.training.steps == 0
        start_needed = self.runtime.guard.enabled and not progress.finished
        if start_needed and not self.store.steps() and is_main:
            self.store.save(self.model, self.optimizer, progress)
        self.processes.wait()

    def _continue_from(self, progress: Progress) -> None:
        """What follows are the steps after `progress`."""
        self.progress = progress
        self.task.plan.reorder(len(progress.guard.rollbacks))
        self.lines = ProgressLines(self.name, self.training.steps, progress.step, self.log)

    def _step(self) -> Trouble | None:
        """Take one optimiser step, unless its loss or gradient shows trouble."""
        progress = self.progress
        self._enter_stage()
        slower = self.guard.rate_factor(len(progress.guard.rollbacks))
        rate = self.rate(progress.step) * slower
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

    def _enter_stage(self) -> None:
        """Begin another stage of the task's curriculum, where the next step is its first."""
        if self.curriculum is None:
            return
        stage, before = self.curriculum.stage(self.progress.step), self.progress.stage
        if stage == before:
            return
        if before is not None and self.curriculum.resets_optimizer:
            self.optimizer.state.clear()
        self.guard.forget(self.progress.guard)
        self.progress.stage = stage

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
            self.backward.zero_gradients()
            try:
                with self.autocast():
                    return accumulate_gradients(
                        self.model,
                        self.task,
                        progress.step,
                        self.training.max_grad_norm,
                        self.backward,
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
            self.backward.forget()
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
        self._continue_from(earlier)
        self.metrics.rewind(earlier)
        self.metrics.write({"rollbacks": len(rollbacks)})
        self.log(f"warning: {self.name}: diverged: {describe(rollbacks[-1])}")

    def _warn_of_accuracy(self) -> None:
        """Say so where the accuracy that was to end the training was not reached."""
        wanted, reached = self.training.stop_at_accuracy, self.progress.best_accuracy
        if wanted is not None and reached is not None and reached < wanted:
            self.log(
                f"warning: {self.name}: ended after {self.progress.step} steps below "
                f"stop_at_accuracy {wanted:g}: validation accuracy {reached:g}"
            )

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


# ------------------------------------------------------------------------------------- selection


def _note_accuracy(training: Training, progress: Progress, values: dict[str, float]) -> bool:
    """Record whether training is over; returns whether these are the selected weights so far."""
    progress.finished = progress.step >= training.steps
    accuracy = values.get("validation_accuracy")
    if accuracy is None:
        return False
    enough = training.stop_at_accuracy is not None and accuracy >= training.stop_at_accuracy
    progress.finished = progress.finished or enough
    length = values.get("validation_reasoning_tokens")
    if training.select == "last":
        selected = progress.finished
    else:
        selected = progress.best_step is None or _rank(accuracy, length) > _rank(
            progress.best_accuracy, progress.best_length
        )
    if selected:
        progress.best_step, progress.best_accuracy = progress.step, accuracy
        progress.best_length = length
    return selected


def _rank(accuracy: float, length: float | None) -> tuple[float, float]:
    """Higher accuracy is better; at equal accuracy, shorter reasoning."""
    return accuracy, -(length or 0.0)
