"""A training that takes milliseconds, for the tests of the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from latent_reasoning.config import Guard, Runtime, Training
from latent_reasoning.runtime.parallel import ALONE, OneProcess
from latent_reasoning.runtime.seeds import seed_for
from latent_reasoning.runtime.signals import StopRequest
from latent_reasoning.runtime.tracking import Tracker
from latent_reasoning.training.checkpoints import CheckpointStore, claim_checkpoint_folder
from latent_reasoning.training.loop import Trainer, TrainResult
from latent_reasoning.training.task import LossOutput

FEATURES = 3


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, FEATURES)
    )


@dataclass
class TinyPlan:
    """How often the data order has changed, and in which pieces a step's four rows are read."""

    micro_batch_size: int = 4
    rollbacks: int = 0

    def reorder(self, rollbacks: int) -> None:
        self.rollbacks = rollbacks

    def limit_micro_batches(self, size: int) -> None:
        self.micro_batch_size = min(size, self.micro_batch_size)


@dataclass
class TinyTask:
    """Regression from ids to numbers; every step's data come from (seed, step, rollbacks) alone.

    `fault(step, rollbacks)` is a factor on the loss; `memory(step)` is how many rows fit into it.
    """

    model: nn.Module
    accuracies: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    seconds_a_step: float = 0.0
    validation_rows: int | None = None
    fault: Callable[[int, int], float] = lambda step, rollbacks: 1.0
    memory: Callable[[int], int] = lambda step: 4
    plan: TinyPlan = field(default_factory=TinyPlan)
    processes: OneProcess = ALONE
    iterations: int = 1
    name: str = "tiny"
    validations: int = 0
    last_step: int = -1

    def micro_batches(self, step: int) -> list[torch.Tensor]:
        self.last_step = step
        time.sleep(self.seconds_a_step)
        generator = torch.Generator().manual_seed(seed_for(0, f"data {step}", self.plan.rollbacks))
        ids = torch.randint(0, 11, (4,), generator=generator)
        return self.processes.share(ids.split(self.plan.micro_batch_size))

    def loss(self, micro_batch: torch.Tensor) -> LossOutput:
        if len(micro_batch) > self.memory(self.last_step):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2 GiB.\nMore lines."
            )
        predicted = self.model(micro_batch)
        target = torch.sin(micro_batch[:, None] + torch.arange(FEATURES))
        loss = (predicted - target).square().mean()
        loss = loss * self.fault(self.last_step, self.plan.rollbacks)
        return LossOutput(loss, len(micro_batch), {"double_loss": 2 * loss})

    def validate(self) -> dict[str, float]:
        self.validations += 1
        if not self.accuracies:
            return {}
        values = {"validation_accuracy": self.accuracies.pop(0)}
        if self.lengths:
            values["validation_reasoning_tokens"] = self.lengths.pop(0)
        if self.validation_rows:
            values["validation_rows"] = self.validation_rows
        return values


def nan_at(broken: int) -> Callable[[int, int], float]:
    """A fault: the loss of step `broken` is never a number."""
    return lambda step, rollbacks: math.nan if step == broken else 1.0


def settings(**changes) -> Training:
    values = {"steps": 8, "learning_rate": 0.01, "warmup_steps": 2, "validate_every": 2}
    return Training(**(values | changes))


def run(
    folder: Path,
    task: TinyTask,
    training: Training | None = None,
    *,
    log: list[str] | None = None,
    digest: str = "a",
    checkpoint_every: int = 3,
    stop: StopRequest | None = None,
    guard: Guard | None = None,
    tracker: Tracker | None = None,
) -> TrainResult:
    """Train as a stage does: claim the folder, resume what is in it."""
    say = (log if log is not None else []).append
    with task.processes.main_first():
        if task.processes.is_main:
            claim_checkpoint_folder(folder, digest, say)
    guard = guard or Guard(enabled=False)
    return Trainer(
        task,
        training or settings(),
        Runtime(device="cpu", checkpoint_every=checkpoint_every, guard=guard),
        CheckpointStore(folder, digest, say),
        seed=0,
        tracker=tracker or Tracker(),
        log_every=2,
        stop=stop or StopRequest(),
    ).run()


def out_of_time() -> StopRequest:
    """A request to end after the next step."""
    return StopRequest(budget_minutes=1e-9)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_bitwise_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
