"""What the policies of other methods have in common, as tasks of the training loop."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from torch import Tensor

from latent_reasoning.config import ConfigError, RivalPolicyModel
from latent_reasoning.rl.policy_base import Batch, PolicyBase
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.rollouts import draw_uniforms
from latent_reasoning.runtime import seeds


class Asked(NamedTuple):
    """P prompts of a micro-batch, uniform numbers (P, G, W) for the G samples of each, and keys of
    the prompts for further random numbers."""

    prompts: list[RlPrompt]
    uniforms: Tensor
    keys: list[str]


class PolicyTask(PolicyBase[Batch]):
    """What a policy is trained with; nothing of it is captured."""

    entry: RivalPolicyModel

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
