"""CoLaR RL: GRPO over latent inputs that are sampled from a Gaussian (arXiv 2505.16552).

What is scored is each latent input, by the mean log density of its features, and each token: stop
decisions, which the public code leaves out but for the last, and the answer's words. Both have a
clipped surrogate of their own, with the sample's advantage; the loss is their sum.

R rows that are samples, N latent steps at most, W tokens at most, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, RivalPolicyModel
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.gaussian import GaussianHead, LatentNoise, log_density
from latent_reasoning.model.given import given_inputs, read_given
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rivals.chains import Chains, Pair
from latent_reasoning.rivals.policy_task import check_fixed
from latent_reasoning.rivals.sampled_task import Drawn, SampledBatch, SampledTask
from latent_reasoning.rl.build import policy_task
from latent_reasoning.rl.grpo import LossType, PolicyLoss, advantages, mean_over, policy_loss
from latent_reasoning.rl.reward import Outcomes
from latent_reasoning.rl.rollouts import SamplingSettings, sample
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import LossOutput


def score_chains(
    model: LatentReasoner, chains: Chains, latents: Tensor, temperature: float = 1.0
) -> Pair:
    """Log-probabilities `(R, W)` of the tokens, and mean log densities `(R, N)` of the latent
    inputs `latents` `(R, N, d)`; 0 where there is none. `chains` are on the model's device."""
    rows, columns = chains.latent_at.T
    values = latents[rows, chains.steps]
    given = latents.new_zeros(*chains.input_ids.shape, latents.shape[-1])
    given = given.index_put((rows, columns), values)
    hidden = read_given(model, given_inputs(model, chains.input_ids, given), chains.mask)
    of_tokens = chains.token_scores(model, hidden, temperature)
    head = model.recurrent_filter
    mean, log_std = head.distribution(hidden[rows, columns - 1])
    densities = log_density(values / head.embedding_std, mean, log_std)
    return of_tokens, chains.step_scores(densities, latents.shape[1])


def chain_loss(
    scores: Pair,
    masks: Pair,
    advantages: Tensor,
    old: Pair | None,
    denominators: Sequence[float],
    *,
    kind: LossType,
    epsilon: float,
) -> tuple[PolicyLoss, PolicyLoss]:
    """The two surrogates of R samples, whose losses add up: of the tokens and of the latent inputs.

    `scores` are those of `score_chains`, `masks` say which of them count, `old` are those under the
    policy that sampled; None: this one. `kind` and `denominators` as in `rl.grpo.policy_loss`.
    """
    token_loss, latent_loss = (
        policy_loss(
            values,
            advantages,
            mask,
            kind=kind,
            epsilon=epsilon,
            kl_weight=0.0,
            max_completion_length=mask.shape[1],
            old_log_probs=before,
            # Where no sample takes a latent step there is nothing to divide.
            denominator=denominator or 1.0,
        )
        for values, mask, before, denominator in zip(
            scores, masks, old or (None, None), denominators, strict=True
        )
    )
    return token_loss, latent_loss


class ColarPolicyTask(SampledTask):
    """Learn from rewarded samples of chains and answers; every sample has its own noise."""

    divisors: Sequence[float]
    """What the sums over tokens and over latent inputs are divided by, for each sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.numbers = self.entry.max_new_tokens
        self.model.change_settings(max_latent_steps=self.entry.max_latent_steps)

    def draw(self, prompts: Sequence[list[int]], uniforms: Tensor, keys: Sequence[str]) -> Drawn:
        """Uniform numbers draw the tokens, noise the latent inputs."""
        noise = LatentNoise(self.seed, keys, self.model.base.config.hidden_size)
        how = SamplingSettings(
            self.entry.temperature, self.entry.max_new_tokens, self.tokenizer.eos_token_id
        )
        rollout, trajectory = sample(self.model, prompts, uniforms.unsqueeze(1), how, noise)
        assert trajectory is not None
        # Without any step there is no input, and a tensor of none has to know its width.
        none = trajectory.hidden[0].unsqueeze(1)[:, :0]
        latents = torch.stack(trajectory.inputs, 1) if trajectory.inputs else none
        return [completion.ids for completion in rollout.completions], latents  # one a row

    def scores(self, chains: Chains, latents: Tensor) -> Pair:
        """`score_chains` at the temperature of sampling."""
        return score_chains(self.model, chains, latents, self.entry.temperature)

    def earned(self, outcomes: Outcomes, steps: Tensor) -> Tensor:
        """Rewards, divided by the number of steps where the entry says so."""
        earned = super().earned(outcomes, steps)
        return earned / steps.clamp(min=1) if self.entry.reward_per_step else earned

    def relative(self, earned: Tensor) -> Tensor:
        """As in this project's own RL."""
        return advantages(earned, self.entry.group_size)

    def surrogate(
        self, scores: Pair, masks: Pair, advantages: Tensor, old: Pair | None
    ) -> LossOutput:
        """Both surrogates, each of its own mean over the whole step."""
        samples = float(len(advantages))
        of_tokens, of_latents = chain_loss(
            scores,
            masks,
            advantages,
            old,
            [samples * divisor for divisor in self.divisors],
            kind=self.entry.loss,
            epsilon=self.entry.epsilon,
        )
        metrics = {
            "token_loss": of_tokens.loss.detach(),
            "latent_loss": of_latents.loss.detach(),
            "clip_share": of_latents.clip_low + of_latents.clip_high,
        }
        return LossOutput(of_tokens.loss + of_latents.loss, samples, metrics)

    def _sample(self, round_: int) -> list[SampledBatch]:
        """Sample, and note the divisors of the whole step."""
        batches, how = super()._sample(round_), (self.entry.loss, self.entry.max_new_tokens)
        own = [
            (len(b.advantages), *(mean_over(m, torch.ones(len(m)), *how) for m in b.masks))
            for b in batches
        ]
        samples, *divisors = map(sum, zip(*self.processes.gather(own), strict=True))
        self.divisors = [divisor / samples for divisor in divisors]
        return batches


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, ColarPolicyTask]:
    """The model that RL starts from, its tokenizer and the task.

    Raises `ConfigError` for a model without a Gaussian filter, and for settings that this policy
    does not have.
    """
    entry: RivalPolicyModel = run.entry
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, run.device.type), load_tokenizer(parent)
    head = model.recurrent_filter
    if not isinstance(head, GaussianHead) or head.log_std is None:
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} has no latent inputs to sample; start from a "
            "model whose filter is gaussian, with deterministic_latents: false"
        )
    check_fixed(run.name, entry, "has no reference model", kl_weight=0.0)
    model.change_settings(allow_rethinking=False, latent_noise=0.0)
    return model, tokenizer, policy_task(run, ColarPolicyTask, model, tokenizer)
