"""The one training loop that every stage shares.

A stage describes what is trained as a `Task`: the micro-batches of a step, their loss, and the
greedy validation. The loop owns the rest: AdamW with decay groups, schedule, accumulation,
clipping, validation with selection of the best weights, early stop, checkpoints, metrics and
progress lines.

Everything random in step `s` is a function of (seed, s, rollbacks): a task draws its data that way,
and torch's generator (dropout, sampling) is seeded anew at each step. A training that was killed
and goes on from its last checkpoint therefore ends, on CPU, with bitwise the same weights as one
never killed. Rollbacks are what a diverging training gets (`divergence.py`): from its last good
checkpoint it goes on with other random numbers.

Under `accelerate launch` every process runs this loop over its share of each step's micro-batches
(`parallel.py`); the first one alone writes checkpoints and metrics.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from latent_reasoning.config import Runtime, Training
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import autocast, resolve_precision
from latent_reasoning.runtime.files import atomic_file, write_json_lines
from latent_reasoning.runtime.memory import OutOfMemoryError, memory_shortage, release
from latent_reasoning.runtime.parallel import current
from latent_reasoning.runtime.signals import StopRequest, TrainingInterruptedError
from latent_reasoning.runtime.tracking import Tracker
from latent_reasoning.training.checkpoints import CheckpointStore, Log, Progress, parameter_names
from latent_reasoning.training.divergence import DivergenceError, DivergenceGuard, Trouble, describe

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
PROGRESS_SECONDS = 10.0


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
    """Examples a micro-batch; the loop lowers it where memory does not suffice."""

    def reorder(self, rollbacks: int) -> None:
        """From now on read what belongs to a training after so many rollbacks."""


class Task(Protocol):
    """What a stage trains: its data, loss and validation."""

    name: str

    iterations: int
    """Consecutive steps on the same samples, between which no checkpoint may fall."""

    plan: Plan

    def micro_batches(self, step: int) -> Sequence[Any]:
        """This process's micro-batches of optimiser step `step` (from 0), a function of `step`.

        Of all processes' micro-batches, `current().share` gives each its own.
        """

    def loss(self, micro_batch: Any) -> LossOutput:
        """Loss of one micro-batch, with its graph."""

    def validate(self) -> dict[str, float]:
        """Greedy `validation_accuracy`, `validation_reasoning_tokens`, ..; or nothing at all.

        `validation_rows`, how many rows these are means of, is not logged.

        All processes call it, and get the same values.
        """


@dataclass(frozen=True)
class TrainResult:
    """What a training came to; the model holds the weights of `step`."""

    step: int
    steps_run: int
    validation_accuracy: float | None
    validation_reasoning_tokens: float | None
    metrics: Path
    selection: str
    rollbacks: list[dict[str, Any]]


def train(
    model: nn.Module,
    task: Task,
    training: Training,
    *,
    runtime: Runtime,
    checkpoint_folder: Path,
    digest: str,
    seed: int,
    tracker: Tracker,
    log_every: int = 10,
    log: Log | None = None,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train `model` in place, or go on where a killed training of the same `digest` stopped.

    Returns with the selected weights in the model. Raises `DivergenceError` where it diverges and
    rollbacks do not help, and after a checkpoint `TrainingInterruptedError` where `stop` says so.
    """
    log, stop = log or print_to_stderr, stop or StopRequest()
    processes = current()
    optimizer = build_optimizer(model, training)
    with processes.main_first():
        store = CheckpointStore(checkpoint_folder, digest, log)
        progress = store.resume(model, optimizer) or Progress()
    processes.broadcast(parameter_names(model))
    if progress.step:
        log(f"{task.name}: goes on after step {progress.step}")
    if progress.micro_batch_size is not None:
        task.plan.micro_batch_size = min(task.plan.micro_batch_size, progress.micro_batch_size)
    metrics = MetricsLog(store.folder / "metrics.jsonl", progress, tracker)
    lines = ProgressLines(task.name, training.steps, progress.step, log)
    rate = learning_rate(training)
    precision = resolve_precision(runtime.precision, _device(model))
    guard = DivergenceGuard(runtime.guard, training.max_grad_norm)
    progress.finished = progress.finished or training.steps == 0
    if runtime.guard.enabled and not store.steps() and not progress.finished and processes.is_main:
        store.save(model, optimizer, progress)
    processes.wait()

    def go_back(trouble: Trouble) -> Progress:
        guard.check_patience(task.name, progress.guard, trouble)
        earlier = _roll_back(model, optimizer, store, guard, trouble, progress)
        metrics.rewind(earlier)
        metrics.write({"rollbacks": len(earlier.guard.rollbacks)})
        log(f"warning: {task.name}: diverged: {describe(earlier.guard.rollbacks[-1])}")
        return earlier

    while not progress.finished:
        rollbacks = len(progress.guard.rollbacks)
        task.plan.reorder(rollbacks)
        purpose = processes.purpose(seeds.STEP.format(model=task.name, step=progress.step))
        step_seed = seeds.seed_for(seed, purpose, rollbacks)
        current_rate = rate(progress.step) * guard.rate_factor(progress.guard)
        for group in optimizer.param_groups:
            group["lr"] = current_rate
        model.train()
        values = _gradients_within_memory(model, task, progress, precision, step_seed, log)
        values["gradient_norm"] = _clip(model, training.max_grad_norm)
        trouble = guard.judge_step(progress.guard, progress.step, values)
        if trouble is not None:
            progress = go_back(trouble)
            continue
        optimizer.step()
        values["learning_rate"] = current_rate
        progress.step += 1
        metrics.add(values)
        if progress.step % log_every == 0 or progress.step == training.steps:
            lines.loss(progress.step, metrics.flush())
        improved = False
        if progress.step % training.validate_every == 0 or progress.step == training.steps:
            measured = _validate(model, task, precision)
            rows = measured.pop("validation_rows", None)
            metrics.write(measured)
            lines.validation(progress.step, measured)
            accuracy = measured.get("validation_accuracy")
            trouble = guard.judge_validation(progress.guard, progress.step, accuracy, rows)
            if trouble is not None:
                progress = go_back(trouble)
                continue
            improved = _note_accuracy(training, progress, measured)
        due = improved or progress.finished or progress.step % runtime.checkpoint_every == 0
        interrupted = _interruption(task, progress, stop)
        if (due or interrupted) and processes.is_main:
            store.save(model, optimizer, progress)
        if interrupted:
            metrics.close()
            processes.wait()
            raise TrainingInterruptedError(_farewell(task.name, interrupted, progress, training))
    metrics.close()
    processes.wait()
    return _select(model, store, training, progress, metrics.path)


def _roll_back(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    store: CheckpointStore,
    guard: DivergenceGuard,
    trouble: Trouble,
    progress: Progress,
) -> Progress:
    """Load the last checkpoint from before the trouble, and note the rollback in it."""
    processes = current()
    with processes.main_first():
        earlier = store.resume(model, optimizer, until=trouble.good_until)
    if earlier is None:
        raise DivergenceError(
            f"{trouble.reason}: the training diverged, and no checkpoint from before is left in "
            f"{store.folder}; remove the folder to train afresh"
        )
    history = guard.record(progress.guard, trouble, progress.step, earlier.step)
    earlier.guard.rollbacks = history
    earlier.micro_batch_size = progress.micro_batch_size
    processes.wait()
    if processes.is_main:
        store.restart_from(earlier)
    return earlier


def _interruption(task: Task, progress: Progress, stop: StopRequest) -> str | None:
    """Why the training is to end after this step; all processes agree on it."""
    if progress.finished or progress.step % task.iterations:
        return None
    reason = stop.reason
    if not current().any_rank(reason is not None):
        return None
    return reason or "another process was asked to end"


def _farewell(name: str, reason: str, progress: Progress, training: Training) -> str:
    return (
        f"{name}: {reason}: ended with a checkpoint; goes on from step {progress.step} of "
        f"{training.steps} when run again"
    )


def print_to_stderr(line: str) -> None:
    """Print a line where logs go, at once; of several processes the first one does."""
    if current().is_main:
        print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------ one step's parts


def _gradients_within_memory(
    model: nn.Module,
    task: Task,
    progress: Progress,
    precision: torch.dtype,
    seed: int,
    log: Log,
) -> dict[str, float]:
    """`accumulate_gradients`, with half the micro-batch as often as memory does not suffice.

    What a step gives is what it gives with the smaller micro-batch from the start. The size is
    kept for the steps to come, also after a kill: `Progress` has it.
    """
    while True:
        torch.manual_seed(seed)
        model.zero_grad()
        try:
            with autocast(_device(model), precision):
                return accumulate_gradients(model, task, progress.step)
        except OutOfMemoryError as error:
            reason = str(error)
        size = task.plan.micro_batch_size
        if size == 1:
            raise OutOfMemoryError(
                f"{task.name}: out of memory with a single example ({reason}): give the job more "
                "memory, set runtime.precision to bfloat16 (on a GPU), train an adapter (lora), or "
                "lower data.max_tokens or (RL) group_size"
            )
        task.plan.micro_batch_size = progress.micro_batch_size = size // 2
        model.zero_grad()
        release()
        log(
            f"warning: {task.name}: out of memory at step {progress.step + 1} with micro-batches "
            f"of {size}, goes on with {size // 2}; the batch stays the same ({reason})"
        )


def accumulate_gradients(model: nn.Module, task: Task, step: int) -> dict[str, float]:
    """Gradient of the weighted mean loss over the step's micro-batches, and its metrics.

    Both are those of all processes' micro-batches. Raises `OutOfMemoryError` on all processes where
    memory does not suffice on one.
    """
    processes = current()
    outputs = []
    with memory_shortage():
        micro_batches = task.micro_batches(step)
        whole = processes.count == 1 and len(micro_batches) == 1
        for micro_batch in micro_batches:
            output = task.loss(micro_batch)
            # The total weight may only be known at the end: the gradient is divided by it there.
            (output.loss if whole else output.loss * output.weight).backward()
            outputs.append((output.weight, _numbers({"loss": output.loss} | output.metrics)))
    outputs = processes.gather(outputs)
    processes.sum_gradients(parameter_names(model))
    total = sum(weight for weight, _ in outputs)
    if not whole:
        gradients = [p.grad for p in parameter_names(model) if p.grad is not None]
        torch._foreach_div_(gradients, total)
    names = dict.fromkeys(name for _, values in outputs for name in values)
    share = {name: [(w, v[name]) for w, v in outputs if name in v] for name in names}
    return {
        name: sum(w * v for w, v in pairs) / (sum(w for w, _ in pairs) or 1.0)
        for name, pairs in share.items()
    }


def build_optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with weight decay on those of `decay_groups` alone."""
    names = {name: parameter for parameter, name in parameter_names(model).items()}
    decayed, undecayed = decay_groups(model)
    groups = [
        {"params": [names[name] for name in decayed], "weight_decay": training.weight_decay},
        {"params": [names[name] for name in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        fused=True,
    )


def decay_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the trained parameters with and without weight decay.

    Matrices are decayed, embeddings among them; biases and norms, which are vectors, are not, nor
    are the special tokens' own modules (conformance note 15).
    """
    decayed, undecayed = [], []
    for parameter, name in parameter_names(model).items():
        exempt = parameter.ndim < 2 or "special_rows." in name
        (undecayed if exempt else decayed).append(name)
    return decayed, undecayed


def learning_rate(training: Training) -> Callable[[int], float]:
    """The learning rate of update `step` (from 0): transformers' schedules, as a function."""
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    floor = training.learning_rate_floor
    schedule = get_scheduler(
        "cosine_with_min_lr" if floor else SCHEDULES[training.schedule],
        unused,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=training.steps,
        scheduler_specific_kwargs={"min_lr_rate": floor} if floor else None,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: training.learning_rate * factor(step)


def _clip(model: nn.Module, max_norm: float) -> float:
    """Clip the gradient to a global norm; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(list(parameter_names(model)), max_norm))


def _numbers(values: dict[str, float | Tensor]) -> dict[str, float]:
    """Scalars as plain floats, with one transfer from the device."""
    tensors = [value.detach().double() for value in values.values() if isinstance(value, Tensor)]
    from_tensors = iter(torch.stack(tensors).tolist() if tensors else [])
    return {
        name: next(from_tensors) if isinstance(value, Tensor) else float(value)
        for name, value in values.items()
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# -------------------------------------------------------------------------- validation, selection


def _validate(model: nn.Module, task: Task, precision: torch.dtype) -> dict[str, float]:
    model.eval()
    with torch.no_grad(), autocast(_device(model), precision):
        return dict(task.validate())


def _note_accuracy(training: Training, progress: Progress, values: dict[str, float]) -> bool:
    """Note whether training is over, and say whether these weights are to be kept as the best."""
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
    """Higher accuracy first; among equals the shorter reasoning, then the earlier step."""
    return accuracy, -(length or 0.0)


def _select(
    model: nn.Module, store: CheckpointStore, training: Training, progress: Progress, metrics: Path
) -> TrainResult:
    """Put the selected weights into the model."""
    if training.select == "last" or progress.best_step is None:
        selection = f"the last step ({progress.step})"
    else:
        store.load_weights(progress.best_step, model)
        selection = (
            f"step {progress.best_step} of {progress.step}: highest greedy accuracy on the "
            "validation rows; among equals the shortest reasoning, then the earliest step"
        )
    model.eval()
    return TrainResult(
        step=progress.best_step if progress.best_step is not None else progress.step,
        steps_run=progress.step,
        validation_accuracy=progress.best_accuracy,
        validation_reasoning_tokens=progress.best_length,
        metrics=metrics,
        selection=selection,
        rollbacks=progress.guard.rollbacks,
    )


# ------------------------------------------------------------------------------ metrics, progress


class MetricsLog:
    """`metrics.jsonl`: a JSON object a logged step, which tracking gets too.

    On resume what was logged after the checkpoint is cut off, for it is computed again. Times are
    left out: equal trainings give equal files. Of several processes the first one writes.
    """

    def __init__(self, path: Path, progress: Progress, tracker: Tracker) -> None:
        self.path = path
        self.tracker = tracker
        self.stream: TextIO | None = None
        self.rewind(progress)

    def rewind(self, progress: Progress) -> None:
        """Go on from `progress`; what was logged after it is cut off."""
        self.close()
        self.progress = progress
        if current().is_main:
            kept = [row for row in read_metrics(self.path) if row["step"] <= progress.step]
            write_json_lines(self.path, kept)
            self.stream = self.path.open("a", encoding="utf-8")

    def add(self, values: dict[str, float]) -> None:
        """Count one step's values for the next mean."""
        window = self.progress.window
        for name, value in values.items():
            window[name] = window.get(name, 0.0) + value
        self.progress.window_steps += 1

    def flush(self) -> dict[str, float]:
        """Log the means over the steps since the last time; returns them."""
        count = self.progress.window_steps
        means = {name: total / count for name, total in self.progress.window.items()}
        self.progress.window, self.progress.window_steps = {}, 0
        self.write(means)
        return means

    def write(self, values: dict[str, float]) -> None:
        """Log values of the current step."""
        if values and self.stream is not None:
            self.stream.write(json.dumps({"step": self.progress.step, **values}) + "\n")
            self.stream.flush()
            self.tracker.log_metrics(values, self.progress.step)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a line that is unfinished or damaged ends it."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                rows.append({"step": int(row["step"]), **row})
            except (ValueError, TypeError, KeyError):
                break
    return rows


def write_training_csv(metrics: Path, path: Path) -> None:
    """`metrics.jsonl` as a table: a row a step, a column a metric, empty where not measured."""
    by_step: dict[float, dict[str, float]] = {}
    for row in read_metrics(metrics):
        by_step.setdefault(row["step"], {}).update(row)
    columns = dict.fromkeys(["step", *(name for row in by_step.values() for name in row)])
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(by_step.values())


class ProgressLines:
    """Plain lines on how a training goes, readable in a terminal and in a log file."""

    def __init__(self, name: str, steps: int, first_step: int, log: Log) -> None:
        self.name, self.steps, self.first_step, self.log = name, steps, first_step, log
        self.started = time.monotonic()
        self.printed = -math.inf
        self.means: dict[str, float] = {}

    def loss(self, step: int, means: dict[str, float]) -> None:
        """A line with the loss and its parts, unless the last one was printed just now."""
        self.means = means
        if time.monotonic() - self.printed >= PROGRESS_SECONDS:
            self._print(step, means)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """A line with loss, accuracy and length, always."""
        self._print(step, {"loss": self.means.get("loss", math.nan), **values})

    def _print(self, step: int, values: dict[str, float]) -> None:
        self.printed = time.monotonic()
        elapsed = self.printed - self.started
        left = elapsed / max(1, step - self.first_step) * (self.steps - step)
        text = "  ".join(_readable(name, value) for name, value in values.items())
        self.log(f"{self.name}  step {step}/{self.steps}  {text}  {_clock(left)} left")


def _readable(name: str, value: float) -> str:
    name = name.removeprefix("validation_").replace("_", " ")
    return f"{name} {value:.2e}" if 0 < abs(value) < 1e-3 else f"{name} {value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
