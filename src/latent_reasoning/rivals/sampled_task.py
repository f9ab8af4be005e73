"""A policy whose samples all differ from their first latent step on, as a task of the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import RivalPolicyModel, Runtime
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.task import check_iterations
from latent_reasoning.runtime.parallel import ALONE, OneProcess
from latent_reasoning.training.batches import BatchPlan

Batch = TypeVar("Batch")


@dataclass
class SampledTask(ABC, Generic[Batch]):
    """What such a policy is trained with; a method samples its batches and scores them.

    Raises `ConfigError` where samples cannot be used for `entry.iterations` updates.
    """

    name: str
    model: LatentReasoner
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[RlPrompt]
    entry: RivalPolicyModel
    runtime: Runtime
    seed: int
    validate: Callable[[], dict[str, float]]
    processes: OneProcess = ALONE

    def __post_init__(self) -> None:
        check_iterations(self.name, self.entry, self.runtime)
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
        """Sample and judge this process's share of the groups of a step."""

    def micro_batches(self, step: int) -> list[Batch]:
        """The samples of `step`; with `iterations` > 1 consecutive steps share their samples."""
        round_ = step // self.iterations
        wanted = (round_, self.plan.rollbacks, self.plan.micro_batch_size)
        if wanted != self._sampled:
            self._sampled, self._batches = wanted, self._sample(round_)
        return self._batches

    def prepare(self, step: int) -> None:
        """Nothing: samples depend on the weights."""

    def planned(self, micro_batch: Batch) -> None:
        """None: hardly two batches have the same shape."""

    def program(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Not captured."""
        raise NotImplementedError
