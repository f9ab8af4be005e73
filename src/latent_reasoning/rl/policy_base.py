"""What every policy's training has in common, as a task of the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, PolicyModel, Runtime
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.runtime.parallel import ALONE, OneProcess
from latent_reasoning.training.batches import BatchPlan
from latent_reasoning.training.task import LossOutput

Batch = TypeVar("Batch")


@dataclass
class PolicyBase(ABC, Generic[Batch]):
    """Prompts that are asked by a plan, with a reward; a policy makes its micro-batches and their
    loss.

    Raises `ConfigError` where samples cannot be used for `entry.iterations` updates.
    """

    name: str
    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[RlPrompt]
    entry: Any
    runtime: Runtime
    seed: int
    validate: Callable[[], dict[str, float]]
    processes: OneProcess = ALONE

    def __post_init__(self) -> None:
        _check_iterations(self.name, self.entry, self.runtime)
        self.iterations = self.entry.iterations
        self.plan = BatchPlan(
            [len(prompt.ids) for prompt in self.prompts],
            self.entry.training,
            self.runtime,
            self.seed,
            self.name,
            processes=self.processes,
        )
        self._sampled = (-1, 0, 0)
        self._batches: list[Batch] = []

    @abstractmethod
    def _sample(self, round_: int) -> list[Batch]:
        """This process's share of the prompts of a round, with what is learned from them."""

    @abstractmethod
    def loss(self, micro_batch: Batch) -> LossOutput:
        """The loss of one micro-batch."""

    def micro_batches(self, step: int) -> list[Batch]:
        """The samples of `step`; with `iterations` > 1 consecutive steps share their samples."""
        round_ = step // self.iterations
        # Halved micro-batches are sampled again, because a trajectory belongs to its batch.
        wanted = (round_, self.plan.rollbacks, self.plan.micro_batch_size)
        if wanted != self._sampled:
            self._sampled, self._batches = wanted, self._sample(round_)
        return self._batches

    def prepare(self, step: int) -> None:
        """Nothing: samples depend on the weights."""


def _check_iterations(name: str, entry: PolicyModel, runtime: Runtime) -> None:
    """Checkpoints hold no samples, so none may fall between two updates on the same samples."""
    for key, value in (
        (f"models.{name}.training.validate_every", entry.training.validate_every),
        ("runtime.checkpoint_every", runtime.checkpoint_every),
    ):
        if value % entry.iterations:
            raise ConfigError(
                f"{key}: {value} is not a multiple of models.{name}.iterations ({entry.iterations})"
            )
