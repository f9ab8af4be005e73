"""Adaptive-length RL as a task of the training loop (docs/method.md, section 5).

A step samples a group of completions for each of its prompts, rewards them, and takes the gradient
of the GRPO loss. What is particular here:

- One latent trajectory serves all samples of a prompt; where a process's share of the step is one
  micro-batch, the gradient flows through the same trajectory from which the samples were drawn.
- The loss is a mean over the whole optimiser step, whatever the micro-batches (the public code
  averages each micro-batch by itself): a micro-batch is weighted by its own denominator.
- Rollouts and scores run in train mode, which the loop sets: LoRA's dropout is active in both, as
  in the public code (conformance note 21), but the samples of a prompt share the dropout of their
  trajectory.
- A prompt's random numbers depend only on seed, step, rollbacks and its place in the step.
- With several processes, each samples and scores whole groups of its own prompts; the outcomes of
  all processes are gathered before they are rewarded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latent_reasoning.config import RlModel
from latent_reasoning.model.frozen import hold_frozen
from latent_reasoning.model.lora import adapter_disabled
from latent_reasoning.model.projection import weights_cast_once
from latent_reasoning.model.reading import sizes_of
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rl.exact import draw_stratified, sample_all_lengths
from latent_reasoning.rl.grpo import PolicyLoss, mean_over, policy_loss
from latent_reasoning.rl.policy_base import PolicyBase
from latent_reasoning.rl.reward import judge_completions, reward_groups
from latent_reasoning.rl.rollouts import Rollout, SamplingSettings, draw_uniforms, sample
from latent_reasoning.rl.scoring import Scoring, loss_mask, score, score_completions
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import held_precision, to_device
from latent_reasoning.runtime.graphs import Programs
from latent_reasoning.runtime.memory import memory_shortage
from latent_reasoning.training.task import LossOutput, Planned

Draw = Callable[..., tuple[Rollout, Trajectory | None]]
"""Samples prompts with their parts of the random numbers: `sample` or `sample_all_lengths`."""


@dataclass
class GroupBatch:
    """The judged rollout of a micro-batch: U distinct completions of at most T tokens.

    `advantages` is (U,), `metrics` the means of the whole step. `reference` (U, T) holds the
    log-probabilities under the reference policy, None without a KL term. `trajectory` is that of
    sampling, valid only for the first update on these samples; `old_log_probs` (U, T) are the
    policy's log-probabilities at that update, kept where more updates follow. Where the update is
    captured, `scoring` says how the completions are scored, and `reference` has its shape.
    """

    rollout: Rollout
    advantages: Tensor
    metrics: dict[str, float]
    reference: Tensor | None
    trajectory: Trajectory | None
    old_log_probs: Tensor | None = None
    scoring: Scoring | None = None

    def take_trajectory(self) -> Trajectory | None:
        """Return the trajectory of sampling and remove it from the batch: it can be used only once.

        It holds the graph of the latent chain, which the backward pass frees only where nothing
        else refers to it, and it is not valid under the weights of the next update.
        """
        trajectory, self.trajectory = self.trajectory, None
        return trajectory


@dataclass(frozen=True)
class PolicyInputs:
    """What the policy loss of U completions of at most T tokens is computed from, rows and columns
    that only make up the number included: `mask` and `reference` (U, T), `weights` and `advantages`
    (U,), and what the loss is divided by, `denominator` ()."""

    scoring: Scoring
    advantages: Tensor
    mask: Tensor
    weights: Tensor
    reference: Tensor | None
    denominator: Tensor


@dataclass
class AdaptiveLengthTask(PolicyBase[GroupBatch]):
    """Learn to stop as early as accuracy allows.

    `model` must be in its initial state, with the adapter attached: that is the reference policy.
    It takes the entry's bound on latent steps, which holds wherever the model thinks from then on.
    """

    entry: RlModel

    def __post_init__(self) -> None:
        super().__post_init__()
        entry = self.entry
        self.model.change_settings(max_latent_steps=entry.max_latent_steps)
        self.sampling = SamplingSettings(
            temperature=entry.temperature,
            max_new_tokens=entry.max_new_tokens,
            eos_id=self.tokenizer.eos_token_id,
        )
        self.start_model: LatentReasoner | None = None
        if entry.kl_weight and self.model.adapter is None:
            self.start_model = copy.deepcopy(self.model).requires_grad_(False).eval()
            held = held_precision(self.runtime.precision, self.model.device)
            hold_frozen(self.start_model, held)
        self._reference = Programs(self._score_by_reference, self.model.device)

    def loss(self, micro_batch: GroupBatch) -> LossOutput:
        """The GRPO loss of one micro-batch, weighted by its own denominator.

        Takes the batch's trajectory; at the first of several updates, stores the policy's
        log-probabilities in the batch.
        """
        rollout, device = micro_batch.rollout, self.model.device
        mask, weights, denominator = self._averaged_over(rollout)
        log_probs = score_completions(
            self.model,
            rollout.prompts,
            rollout.completions,
            self.sampling,
            micro_batch.take_trajectory(),
        )
        result = self._policy_loss(
            log_probs,
            *to_device((micro_batch.advantages, mask), device),
            weights=to_device(weights, device),
            old_log_probs=micro_batch.old_log_probs,
            reference=micro_batch.reference,
            denominator=denominator,
        )
        if self.entry.iterations > 1 and micro_batch.old_log_probs is None:
            micro_batch.old_log_probs = log_probs.detach()
        return LossOutput(result.loss, denominator, self._metrics(result) | micro_batch.metrics)

    def planned(self, micro_batch: GroupBatch) -> Planned | None:
        """The update on a micro-batch; None where its scoring is not captured."""
        scoring = micro_batch.scoring
        if scoring is None:
            return None
        mask, weights, denominator = self._averaged_over(micro_batch.rollout)
        rows, columns = (size - own for size, own in zip(scoring.shape, mask.shape, strict=True))
        inputs = PolicyInputs(
            scoring,
            functional.pad(micro_batch.advantages, (0, rows)),
            functional.pad(mask, (0, columns, 0, rows)),
            functional.pad(weights, (0, rows)),
            micro_batch.reference,
            torch.tensor(denominator),
        )
        return Planned(inputs, denominator, micro_batch.metrics)

    def program(self, inputs: PolicyInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The GRPO loss of a first update, on the model's device."""
        result = self._policy_loss(
            score(self.model, inputs.scoring, self.sampling.temperature),
            inputs.advantages,
            inputs.mask,
            weights=inputs.weights,
            reference=inputs.reference,
            denominator=inputs.denominator,
        )
        return result.loss, self._metrics(result)

    def _averaged_over(self, rollout: Rollout) -> tuple[Tensor, Tensor, float]:
        """Tokens in the loss (U, T), samples of each completion (U,), and the loss's divisor."""
        mask, weights = loss_mask(rollout.completions, self.model.settings), rollout.weights
        return mask, weights, mean_over(mask, weights, self.entry.loss, self.entry.max_new_tokens)

    def _policy_loss(
        self, log_probs: Tensor, advantages: Tensor, mask: Tensor, **values: Any
    ) -> PolicyLoss:
        return policy_loss(
            log_probs,
            advantages,
            mask,
            kind=self.entry.loss,
            epsilon=self.entry.epsilon,
            kl_weight=self.entry.kl_weight,
            max_completion_length=self.entry.max_new_tokens,
            **values,
        )

    def _metrics(self, result: PolicyLoss) -> dict[str, Tensor]:
        kl = {"kl": result.kl} if self.entry.kl_weight else {}  # measured only where it is used
        return kl | {"clip_share": result.clip_low + result.clip_high}

    @torch.no_grad()
    def reference_log_probs(
        self, rollout: Rollout, scoring: Scoring | None = None
    ) -> Tensor | None:
        """Log-probabilities (U, T) under the initial model, of the shape that `scoring` has; None
        without a KL term."""
        if not self.entry.kl_weight:
            return None
        if scoring is not None:
            return self._reference(scoring).clone()
        with self._as_reference() as model:
            return score_completions(model, rollout.prompts, rollout.completions, self.sampling)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[LatentReasoner]:
        """The initial model."""
        with contextlib.nullcontext() if self.start_model else adapter_disabled(self.model):
            yield self.start_model or self.model

    def _score_by_reference(self, scoring: Scoring) -> Tensor:
        with self._as_reference() as model, torch.no_grad(), weights_cast_once():
            return score(model, scoring, self.sampling.temperature)

    def _scoring(self, place: int, rollout: Rollout) -> Scoring | None:
        """How completions of the micro-batch in a `place` of the step are scored by captured
        programs; None where they are not."""
        special = self.model.settings
        thinks_again = any(special.start_id in each.ids for each in rollout.completions)
        if self.model.sizes is None or self.iterations > 1 or thinks_again:
            return None
        sizes = self.model.sizes
        with sizes_of(self.model, f"micro-batch {place}"):
            scoring = Scoring.plan(self.model, rollout.prompts, rollout.completions, sizes=sizes)
        return to_device(scoring, self.model.device)

    def _sample(self, round_: int) -> list[GroupBatch]:
        """Sample and judge this process's share of a step's groups; reward those of all."""
        if self.plan.micro_batch_size != self._sampled[2]:
            self._reference.clear()
        plan = self.plan.micro_batches(round_)
        sizes = [len(part) for part in plan]
        draws = list(zip(*(numbers.split(sizes) for numbers in self._draws(round_)), strict=True))
        parts = self.processes.share(plan)
        prompts = [[self.prompts[index] for index in part] for part in parts]
        # A single micro-batch keeps its trajectory's graph for the update. Several would need the
        # memory of all their graphs at once, and saving memory is what they are for.
        draw: Draw = sample if self.entry.estimator == "sampled" else sample_all_lengths
        graph = len(parts) == 1 and self.model.sizes is None
        with memory_shortage(self.processes), torch.set_grad_enabled(graph):
            sampled = [
                draw(self.model, [prompt.ids for prompt in part], *own, self.sampling)
                for part, own in zip(prompts, self.processes.share(draws), strict=True)
            ]
            scorings = [self._scoring(place, rollout) for place, (rollout, _) in enumerate(sampled)]
            references = [
                self.reference_log_probs(rollout, scoring)
                for (rollout, _), scoring in zip(sampled, scorings, strict=True)
            ]
        rollouts = [rollout for rollout, _ in sampled]
        outcomes = [
            judge_completions(rollout, part, self.tokenizer, self.model.settings.answer_text)
            for rollout, part in zip(rollouts, prompts, strict=True)
        ]
        questions = [self.prompts[index].text for part in plan for index in part]
        advantages, metrics = reward_groups(
            self.processes.gather(rollouts),
            self.processes.gather(outcomes),
            questions,
            self.entry.reward,
        )
        advantages = self.processes.share(advantages)
        return [
            GroupBatch(
                rollout,
                values,
                metrics,
                reference,
                trajectory if graph else None,
                scoring=scoring,
            )
            for (rollout, trajectory), values, reference, scoring in zip(
                sampled, advantages, references, scorings, strict=True
            )
        ]

    def _draws(self, round_: int) -> tuple[Tensor, ...]:
        """The uniform random numbers of all prompts of a step, in the plan's order."""
        prompts, group_size = self.entry.training.batch_size, self.entry.group_size

        def seed(purpose: str) -> int:
            purpose = purpose.format(model=self.name, round=round_)
            return seeds.seed_for(self.seed, purpose, self.plan.rollbacks)

        tokens = self.entry.max_new_tokens
        uniforms = draw_uniforms(prompts, group_size, tokens, seed(seeds.ROLLOUTS))
        if self.entry.estimator == "sampled":
            return (uniforms,)
        return uniforms, draw_stratified(prompts, group_size, seed(seeds.STOP_LENGTHS))
