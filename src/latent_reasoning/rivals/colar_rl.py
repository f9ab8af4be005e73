"""CoLaR RL: GRPO over latent inputs that are sampled from a Gaussian (arXiv 2505.16552).

Every sample of a question has a chain of its own from its first latent step on. What is scored is
each latent input, by the mean log density of its features, and each token: stop decisions, which
the public code leaves out but for the last, and the answer's words. Both have a clipped surrogate
of their own, with the sample's advantage; the loss is their sum.

P prompts, G samples of each, R rows that are samples, N latent steps at most, W tokens at most, d
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, RivalPolicyModel
from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.gaussian import GaussianHead, LatentNoise, log_density
from latent_reasoning.model.given import given_inputs, read_given
from latent_reasoning.model.heads import Targets, target_log_probabilities
from latent_reasoning.model.passes import kinds_of
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.rivals.sampled_task import SampledTask
from latent_reasoning.rl.build import begin_policy
from latent_reasoning.rl.grpo import LossType, PolicyLoss, advantages, policy_loss
from latent_reasoning.rl.reward import Outcomes, judge_completions, rewards
from latent_reasoning.rl.rollouts import Completion, SamplingSettings, draw_uniforms, sample
from latent_reasoning.rl.scoring import loss_mask
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.memory import memory_shortage
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import LossOutput

Pair = tuple[Tensor, Tensor]
"""Of tokens, and of latent inputs."""

# ---------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Chains:
    """R samples as they are scored, in one parallel pass; planned on the host.

    `input_ids` and `mask` (R, T) are prompts and completions. `latent_at` (K, 2) are row and column
    of the latent inputs, `steps` (K,) their numbers in their chains. `rows` and `columns` (M,) say
    where `targets` (M,) are predicted, `tokens` (M,) which tokens of the completions these are.
    """

    input_ids: Tensor
    mask: Tensor
    latent_at: Tensor
    steps: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    targets: Targets

    @classmethod
    def plan(
        cls,
        prompts: Sequence[list[int]],
        completions: Sequence[Sequence[int]],
        special: LatentSettings,
    ) -> Chains:
        """Completion i continues prompt i, which ends in START."""
        input_ids, mask = pad_prompts(
            [[*p, *c] for p, c in zip(prompts, completions, strict=True)], pad_id=0
        )
        kinds, width = kinds_of(input_ids, mask.bool(), special), input_ids.shape[1]
        places = [
            (r, t, width - len(c) + t) for r, c in enumerate(completions) for t in range(len(c))
        ]
        rows, tokens, columns = torch.tensor(places).T
        # Every latent input follows START: its number is that of the token in the completion.
        is_latent = input_ids[rows, columns] == special.continue_id
        targets = Targets.of(input_ids[rows, columns], kinds[rows, columns - 1], special)
        latent_at = torch.stack([rows[is_latent], columns[is_latent]], 1)
        return cls(
            input_ids, mask, latent_at, tokens[is_latent], rows, columns - 1, tokens, targets
        )


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
    predicting = hidden[chains.rows, chains.columns]
    log_probs = target_log_probabilities(model, predicting, chains.targets, temperature)
    head = model.recurrent_filter
    mean, log_std = head.distribution(hidden[rows, columns - 1])
    densities = log_density(values / head.embedding_std, mean, log_std)
    count, longest = len(chains.input_ids), int(chains.tokens.max()) + 1
    of_tokens = log_probs.new_zeros(count, longest)
    of_latents = densities.new_zeros(latents.shape[:2])
    return (
        of_tokens.index_put((chains.rows, chains.tokens), log_probs),
        of_latents.index_put((rows, chains.steps), densities),
    )


def chain_loss(
    log_probs: Pair,
    masks: Pair,
    advantages: Tensor,
    old: Pair | None = None,
    *,
    kind: LossType,
    epsilon: float,
    denominator: float | None = None,
) -> tuple[PolicyLoss, PolicyLoss]:
    """The two surrogates of R samples, whose losses add up: of the tokens and of the latent inputs.

    `log_probs` are those of `score_chains`, `masks` say which of them count, `old` are those under
    the policy that sampled; None: this one. `kind` and `denominator` as in `rl.grpo.policy_loss`.
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
            denominator=denominator if mask.shape[1] else 1.0,
        )
        for values, mask, before in zip(log_probs, masks, old or (None, None), strict=True)
    )
    return token_loss, latent_loss


# ------------------------------------------------------------------------------------------- task


@dataclass
class ChainBatch:
    """The judged samples of a micro-batch: `latents` (R, N, d) are what their chains have read,
    `masks` (R, W) and (R, N) say which tokens and latent inputs count. `old` log-probabilities are
    kept where more updates follow."""

    chains: Chains
    latents: Tensor
    masks: Pair
    advantages: Tensor
    metrics: dict[str, float]
    old: Pair | None = None


class ColarPolicyTask(SampledTask[ChainBatch]):
    """Learn from rewarded samples of chains and answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        entry = self.entry
        self.model.change_settings(max_latent_steps=entry.max_latent_steps)
        self.sampling = SamplingSettings(
            temperature=entry.temperature,
            max_new_tokens=entry.max_new_tokens,
            eos_id=self.tokenizer.eos_token_id,
        )

    def loss(self, micro_batch: ChainBatch) -> LossOutput:
        """Both surrogates, means over the micro-batch's samples.

        At the first of several updates, stores the policy's log-probabilities in the batch.
        """
        batch, device = micro_batch, self.model.device
        chains = to_device(batch.chains, device)
        scores = score_chains(self.model, chains, batch.latents, self.entry.temperature)
        of_tokens, of_latents = chain_loss(
            scores,
            to_device(batch.masks, device),
            to_device(batch.advantages, device),
            batch.old,
            kind=self.entry.loss,
            epsilon=self.entry.epsilon,
        )
        if self.iterations > 1 and batch.old is None:
            batch.old = scores[0].detach(), scores[1].detach()
        metrics = {
            "token_loss": of_tokens.loss.detach(),
            "latent_loss": of_latents.loss.detach(),
            "clip_share": of_latents.clip_low + of_latents.clip_high,
        }
        weight = float(len(batch.advantages))
        return LossOutput(of_tokens.loss + of_latents.loss, weight, metrics | batch.metrics)

    @torch.no_grad()
    def _sample(self, round_: int) -> list[ChainBatch]:
        """Sample and judge this process's share of a step's groups."""
        plan, size = self.plan.micro_batches(round_), self.entry.group_size
        purpose = seeds.ROLLOUTS.format(model=self.name, round=round_)
        seed = seeds.seed_for(self.seed, purpose, self.plan.rollbacks)
        uniforms = draw_uniforms(
            self.entry.training.batch_size, size, self.entry.max_new_tokens, seed
        ).split([len(part) for part in plan])
        first = [sum(len(part) for part in plan[:i]) for i in range(len(plan))]
        with memory_shortage(self.processes):
            return [
                self._sample_part(part, draws, [f"{seed} {place + i}" for i in range(len(part))])
                for part, draws, place in self.processes.share(
                    list(zip(plan, uniforms, first, strict=True))
                )
            ]

    def _sample_part(self, part: list[int], draws: Tensor, keys: list[str]) -> ChainBatch:
        """The samples of some prompts from `draws` (P, G, W); `keys` are those of the prompts'
        noise."""
        size, special = self.entry.group_size, self.model.settings
        asked = [self.prompts[index] for index in part for _ in range(size)]
        noise = LatentNoise(
            self.seed,
            [f"{key} {member}" for key in keys for member in range(size)],
            self.model.base.config.hidden_size,
        )
        prompts = [prompt.ids for prompt in asked]
        rollout, trajectory = sample(
            self.model, prompts, draws.flatten(0, 1).unsqueeze(1), self.sampling, noise
        )
        assert trajectory is not None
        completions = rollout.completions  # one a row, in the rows' order
        counts = torch.tensor([_latent_steps(completion, special) for completion in completions])
        outcomes = Outcomes.of(
            judge_completions(rollout, asked, self.tokenizer, special.answer_text)
        )
        earned = chain_rewards(outcomes, counts, self.entry)
        # Without any step there is no input, and a tensor of none has to know its width.
        none = trajectory.hidden[0].unsqueeze(1)[:, :0]
        latents = torch.stack(trajectory.inputs, 1) if trajectory.inputs else none
        return ChainBatch(
            Chains.plan(prompts, [completion.ids for completion in completions], special),
            latents,
            (
                loss_mask(completions, special),
                torch.arange(latents.shape[1]) < counts[:, None],
            ),
            advantages(earned, size),
            {
                "reward": earned.mean().item(),
                "rollout_accuracy": outcomes.correct.double().mean().item(),
                "reasoning_tokens": outcomes.length.double().mean().item(),
            },
        )


def chain_rewards(outcomes: Outcomes, counts: Tensor, entry: RivalPolicyModel) -> Tensor:
    """Rewards, float64 (R,), of groups of samples with `counts` (R,) latent steps."""
    groups = [row // entry.group_size for row in range(len(counts))]
    earned = rewards(groups, outcomes, entry.reward)
    return earned / counts.clamp(min=1) if entry.reward_per_step else earned


def _latent_steps(completion: Completion, special: LatentSettings) -> int:
    return completion.ids.count(special.continue_id)


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
    if entry.kl_weight:
        raise ConfigError(
            f"models.{run.name}.kl_weight: {entry.kl_weight}, but method: colar has no reference "
            "model; set it to 0"
        )
    model.change_settings(allow_rethinking=False, latent_noise=0.0)
    prompts = begin_policy(run, model, tokenizer)
    task = ColarPolicyTask(
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
