"""What the policies of other methods have in common, as tasks of the training loop."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, RivalPolicyModel, Runtime
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.rollouts import draw_uniforms
from latent_reasoning.rl.task import check_iterations
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.parallel import ALONE, OneProcess
from latent_reasoning.training.batches import BatchPlan
from latent_reasoning.training.task import LossOutput

Batch = TypeVar("Batch")


class Asked(NamedTuple):
    """P prompts of a micro-batch, uniform numbers (P, G, W) for the G samples of each, and keys of
    the prompts for further random numbers."""

    prompts: list[RlPrompt]
    uniforms: Tensor
    keys: list[str]


@dataclass
class PolicyTask(ABC, Generic[Batch]):
    """What a policy is trained with; a method makes its micro-batches and their loss.

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

    @abstractmethod
    def micro_batches(self, step: int) -> list[Batch]:
        """This process's share of the prompts of `step`, with what is learned from them."""

    @abstractmethod
    def loss(self, micro_batch: Batch) -> LossOutput:
        """The loss of one micro-batch."""

    def prepare(self, step: int) -> None:
        """Nothing: samples depend on the weights."""

    def planned(self, micro_batch: Batch) -> None:
        """None: hardly two batches have the same shape."""

    def program(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Not captured."""
        raise NotImplementedError

    def _asked(self, round_: int, numbers: int) -> list[Asked]:
        """This process's micro-batches of a round, with W = `numbers` for each sample."""
        purpose = seeds.ROLLOUTS.format(model=self.name, round=round_)
        seed = seeds.seed_for(self.seed, purpose, self.plan.rollbacks)
        size, group_size = self.entry.training.batch_size, self.entry.group_size
        plan = self.plan.micro_batches(round_)
        uniforms = draw_uniforms(size, group_size, numbers, seed)
        asked, first = [], 0
        for part in plan:
            places = range(first, first + len(part))
            prompts = [self.prompts[index] for index in part]
            keys = [f"{seed} {place}" for place in places]
            asked.append(Asked(prompts, uniforms[places.start : places.stop], keys))
            first = places.stop
        return self.processes.share(asked)


def check_fixed(name: str, entry: RivalPolicyModel, why: str, **values: Any) -> None:
    """Raise `ConfigError`, with the reason `why`, where a key of `entry` has another value than the
    only one that its method has a meaning for."""
    for key, value in values.items():
        own = getattr(entry, key)
        if own != value:
            wanted = json.dumps(value) if isinstance(value, float | int | None) else "its default"
            raise ConfigError(
                f"models.{name}.{key}: {own}, but method: {entry.method} {why}; set it to {wanted}"
            )
