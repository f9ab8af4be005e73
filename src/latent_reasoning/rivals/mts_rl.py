"""CoT2's multi-token sampling as a task of the training loop: GRPO over mixtures of words.

A step samples a group of chains and answers for each of its prompts, rewards them, and takes the
gradient of the clipped surrogate of their latent steps and tokens. What is drawn, and how it is
scored, is in `mts.py`.

P prompts, G samples each, R = P * G rows, n latent steps, K words, W tokens at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, RivalPolicyModel
from latent_reasoning.model.filters import SRE
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rivals.mts import (
    Samples,
    Scored,
    StepPolicy,
    group_advantages,
    sample,
    score,
)
from latent_reasoning.rivals.sampled_task import SampledTask
from latent_reasoning.rl.build import begin_policy
from latent_reasoning.rl.grpo import policy_loss
from latent_reasoning.rl.reward import Outcomes, judge_completions, rewards
from latent_reasoning.rl.rollouts import Completion, Rollout, draw_uniforms
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.memory import memory_shortage
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import LossOutput


@dataclass
class SampleBatch:
    """The judged samples of a micro-batch; `mask` (R, n + W) says what counts in the loss. `old`
    log-probabilities are kept where more updates follow."""

    scored: Scored
    samples: Samples
    mask: Tensor
    advantages: Tensor
    metrics: dict[str, float]
    old: Tensor | None = None


class MtsTask(SampledTask[SampleBatch]):
    """Learn from rewarded samples of latent steps and answers; n steps for every sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        entry = self.entry
        self.steps = self.model.settings.max_latent_steps
        self.policy = StepPolicy(entry.mts.words, entry.mts.ratio, entry.temperature)

    def loss(self, micro_batch: SampleBatch) -> LossOutput:
        """The clipped surrogate of a micro-batch, weighted by its own denominator.

        At the first of several updates, stores the policy's log-probabilities in the batch.
        """
        batch, device = micro_batch, self.model.device
        width = batch.mask.shape[1] - self.steps
        scored = to_device(batch.scored, device)
        log_probs = score(self.model, scored, batch.samples.words, width, self.policy)
        result = policy_loss(
            log_probs,
            to_device(batch.advantages, device),
            to_device(batch.mask, device),
            kind=self.entry.loss,
            epsilon=self.entry.epsilon,
            kl_weight=0.0,
            max_completion_length=self.entry.max_new_tokens,
            old_log_probs=batch.old,
        )
        if self.iterations > 1 and batch.old is None:
            batch.old = log_probs.detach()
        metrics = {"clip_share": result.clip_low + result.clip_high}
        return LossOutput(result.loss, float(result.denominator), metrics | batch.metrics)

    def _sample(self, round_: int) -> list[SampleBatch]:
        """Sample and judge this process's share of a step's groups."""
        entry, plan = self.entry, self.plan.micro_batches(round_)
        purpose = seeds.ROLLOUTS.format(model=self.name, round=round_)
        seed = seeds.seed_for(self.seed, purpose, self.plan.rollbacks)
        answer = entry.max_new_tokens - self.steps - 1
        numbers = self.steps * self.policy.words + answer
        draws = draw_uniforms(entry.training.batch_size, entry.group_size, numbers, seed)
        parts = list(zip(plan, draws.split([len(part) for part in plan]), strict=True))
        with memory_shortage(self.processes):
            return [self._sample_part(*part) for part in self.processes.share(parts)]

    def _sample_part(self, part: list[int], draws: Tensor) -> SampleBatch:
        """The samples of some prompts from `draws` (P, G, n K + W)."""
        asked = [self.prompts[i] for i in part for _ in range(self.entry.group_size)]
        prompts = [prompt.ids for prompt in asked]
        of_words = self.steps * self.policy.words
        word_draws, answer_draws = draws.flatten(0, 1).tensor_split([of_words], 1)
        samples = sample(
            self.model,
            prompts,
            self.policy,
            word_draws.unflatten(1, (self.steps, -1)),
            answer_draws,
            self.tokenizer.eos_token_id,
        )
        completions = samples.completions(self.model.settings)
        rollout = Rollout(
            prompts,
            [Completion(row, ids) for row, ids in enumerate(completions)],
            torch.arange(len(prompts))[:, None],
        )
        outcomes = Outcomes.of(judge_completions(rollout, asked, self.tokenizer))
        groups = [row // self.entry.group_size for row in range(len(prompts))]
        earned = rewards(groups, outcomes, self.entry.reward)
        counts = torch.arange(answer_draws.shape[1]) < samples.lengths.cpu()[:, None]
        all_steps = torch.ones(len(prompts), self.steps, dtype=torch.bool)
        return SampleBatch(
            Scored.plan(prompts, samples, self.model.settings),
            samples,
            torch.cat([all_steps, counts], 1),
            group_advantages(earned.view(-1, self.entry.group_size)).flatten(),
            {
                "reward": earned.mean().item(),
                "rollout_accuracy": outcomes.correct.double().mean().item(),
            },
        )


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, MtsTask]:
    """The model that RL starts from, its tokenizer and the task.

    Raises `ConfigError` for a model whose number of latent steps is not fixed, and for settings
    that this policy does not have.
    """
    entry: RivalPolicyModel = run.entry
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, run.device.type), load_tokenizer(parent)
    settings = model.settings
    if (
        settings is None
        or settings.stop_rule != "fixed"
        or not isinstance(model.recurrent_filter, SRE)
    ):
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} does not take a fixed number of latent steps "
            "that mix words; start from a model that method: csft has trained"
        )
    if entry.kl_weight or entry.max_latent_steps is not None:
        raise ConfigError(
            f"models.{run.name}: method: mts has no reference model and as many latent steps as "
            f"{entry.start}; set kl_weight: 0 and max_latent_steps: null"
        )
    if entry.max_new_tokens < settings.max_latent_steps + 2:
        raise ConfigError(
            f"models.{run.name}.max_new_tokens: {entry.max_new_tokens} leaves no token for the "
            f"answer after {settings.max_latent_steps} latent steps and STOP"
        )
    prompts = begin_policy(run, model, tokenizer)
    task = MtsTask(
        run.name,
        model,
        tokenizer,
        prompts,
        entry,
        run.experiment.runtime,
        seed=run.seed,
        validate=run.validation(model, tokenizer, longest_completion=entry.max_new_tokens),
        processes=run.processes,
    )
    return model, tokenizer, task
