"""GRPO over sampled latent steps: a policy whose samples are chains of their own from the first
latent step on, as a task of the training loop.

A step samples a group of chains and answers for each of its prompts, rewards them, and takes the
gradient of a clipped surrogate of their latent inputs and tokens, once or several times.

P prompts, G samples of each, R = P * G rows, N latent steps, W tokens at most.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latent_reasoning.rivals.chains import Chains, Pair
from latent_reasoning.rivals.policy_task import Asked, PolicyTask
from latent_reasoning.rl.reward import Outcomes, judge_completions, rewards
from latent_reasoning.rl.rollouts import Completion, Rollout
from latent_reasoning.rl.scoring import loss_mask
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.memory import memory_shortage
from latent_reasoning.training.gradients import weighted_means
from latent_reasoning.training.task import LossOutput

Drawn = tuple[list[tuple[int, ...]], Tensor]
"""The completions of R samples, and what their latent steps have read, (R, N, ..)."""


@dataclass
class SampledBatch:
    """The judged samples of a micro-batch; `latents` (R, N, ..) are what their latent steps have
    read, `masks` (R, W) and (R, N) say which tokens and latent inputs count in the loss. `metrics`
    are the means of the whole step; `old` scores are kept where more updates follow."""

    chains: Chains
    latents: Tensor
    masks: Pair
    advantages: Tensor
    metrics: dict[str, float]
    old: Pair | None = None


class SampledTask(PolicyTask[SampledBatch]):
    """Learn from rewarded samples; a method draws them and scores them."""

    numbers: int
    """Uniform numbers that a sample is drawn from."""

    @abstractmethod
    def draw(self, prompts: Sequence[list[int]], uniforms: Tensor, keys: Sequence[str]) -> Drawn:
        """A sample after each of R prompts, from uniform numbers (R, `numbers`) and further random
        numbers that belong to `keys`."""

    @abstractmethod
    def scores(self, chains: Chains, latents: Tensor) -> Pair:
        """Log-probabilities (R, W) and (R, N) under the present weights."""

    @abstractmethod
    def surrogate(
        self, scores: Pair, masks: Pair, advantages: Tensor, old: Pair | None
    ) -> LossOutput:
        """The loss of samples and its metrics; `old` are their scores where they were drawn, None:
        the same."""

    @abstractmethod
    def relative(self, earned: Tensor) -> Tensor:
        """Advantages (R,) from rewards (R,) of groups of consecutive samples."""

    def earned(self, outcomes: Outcomes, steps: Tensor) -> Tensor:
        """Rewards (R,) of groups of consecutive samples that took `steps` (R,) latent steps."""
        groups = [row // self.entry.group_size for row in range(len(steps))]
        return rewards(groups, outcomes, self.entry.reward)

    def loss(self, micro_batch: SampledBatch) -> LossOutput:
        """The surrogate of a micro-batch; at the first of several updates, stores the scores."""
        batch, old = micro_batch, micro_batch.old
        planned = to_device((batch.chains, batch.masks, batch.advantages), self.model.device)
        chains, masks, advantages = planned
        scores = self.scores(chains, batch.latents)
        if self.iterations > 1 and old is None:
            batch.old = scores[0].detach(), scores[1].detach()
        output = self.surrogate(scores, masks, advantages, old)
        return replace(output, metrics=output.metrics | batch.metrics)

    def _sample(self, round_: int) -> list[SampledBatch]:
        """Sample and judge this process's share of a step's groups."""
        with memory_shortage(self.processes), torch.no_grad():
            batches = [self._judged(asked) for asked in self._asked(round_, self.numbers)]
        own = [(float(len(batch.advantages)), batch.metrics) for batch in batches]
        metrics = weighted_means(self.processes.gather(own))
        return [replace(batch, metrics=metrics) for batch in batches]

    def _judged(self, asked: Asked) -> SampledBatch:
        size, special = self.entry.group_size, self.model.settings
        rows = [prompt for prompt in asked.prompts for _ in range(size)]
        keys = [f"{key} {member}" for key in asked.keys for member in range(size)]
        prompts = [prompt.ids for prompt in rows]
        ids, latents = self.draw(prompts, asked.uniforms.flatten(0, 1), keys)
        completions = [Completion(row, own) for row, own in enumerate(ids)]
        rollout = Rollout(prompts, completions, torch.arange(len(rows))[:, None])
        judged = judge_completions(rollout, rows, self.tokenizer, special.answer_text)
        outcomes = Outcomes.of(judged)
        steps = torch.tensor([own.count(special.continue_id) for own in ids])
        earned = self.earned(outcomes, steps)
        tokens = loss_mask(completions, special)
        if special.stop_rule == "fixed":  # no decision is drawn
            tokens &= torch.arange(tokens.shape[1]) > steps[:, None]
        return SampledBatch(
            Chains.plan(prompts, ids, special),
            latents,
            (tokens, torch.arange(latents.shape[1]) < steps[:, None]),
            self.relative(earned),
            {
                "reward": earned.mean().item(),
                "rollout_accuracy": outcomes.correct.double().mean().item(),
                "reasoning_tokens": outcomes.length.double().mean().item(),
            },
        )
