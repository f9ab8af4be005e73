"""CoT2's multi-token sampling: a policy over mixtures of words (arXiv 2505.23648; docs/rivals.md).

A latent step draws K words with replacement and reads the mean of their embeddings. Its probability
is exactly known, that of the K words, so that GRPO applies to latent steps as it does to tokens.

R rows, n latent steps of every sample, K words, W tokens of an answer at most, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import ConfigError, RivalPolicyModel
from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.filters import SRE
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.given import read_given
from latent_reasoning.model.mixtures import Mixture, drawn
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_rows import embedding_matrix
from latent_reasoning.rivals.chains import Chains, Pair
from latent_reasoning.rivals.policy_task import check_fixed
from latent_reasoning.rivals.sampled_task import Drawn, SampledTask
from latent_reasoning.rl.build import policy_task
from latent_reasoning.rl.grpo import policy_loss
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.task import LossOutput

SMALLEST_STD = 1e-12
"""Where all samples of a group earn the same, their advantages are 0."""


@dataclass(frozen=True)
class StepPolicy:
    """How the K words of a latent step are drawn, and how their ratios make one.

    With `divided_logits` the logits are divided by K and the ratios multiplied; with `root` the
    K-th root of their product is taken. Logits are divided by `temperature`, too.
    """

    words: int
    ratio: Literal["divided_logits", "root"] = "divided_logits"
    temperature: float = 1.0

    def log_probabilities(self, model: LatentReasoner, hidden: Tensor) -> Tensor:
        """Log-probabilities `(.., V)` of each of the K words after states `(.., d)`."""
        logits = model.vocabulary_logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.ratio == "divided_logits":
            logits = logits / self.words
        return logits.log_softmax(-1)

    def draw(self, model: LatentReasoner, hidden: Tensor, uniforms: Tensor) -> Tensor:
        """K words `(R, K)` after states `(R, d)`, from uniform numbers `(R, K)`."""
        probabilities = self.log_probabilities(model, hidden).exp()
        return drawn(probabilities.unsqueeze(1).expand(-1, self.words, -1), uniforms)

    def score(self, model: LatentReasoner, hidden: Tensor, words: Tensor) -> Tensor:
        """Log-probabilities `(..)` of steps that drew `words` `(.., K)` after states `(.., d)`;
        differences of them are the logarithms of ratios."""
        log_probs = self.log_probabilities(model, hidden).gather(-1, words)
        return log_probs.sum(-1) if self.ratio == "divided_logits" else log_probs.mean(-1)


def mean_embeddings(model: LatentReasoner, words: Tensor) -> Tensor:
    """The inputs `(.., d)` of latent steps that drew `words` `(.., K)`."""
    matrix = embedding_matrix(model.base, model.settings, model.special_rows)
    even = torch.full(words.shape, 1 / words.shape[-1], dtype=matrix.dtype, device=words.device)
    return Mixture(even, words).embed(matrix)


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards `(P, G)` relative to their group: `(r - mean) / std`, with the population's std."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / rewards.std(1, correction=0, keepdim=True).clamp(min=SMALLEST_STD)


@torch.no_grad()
def sample(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    policy: StepPolicy,
    word_draws: Tensor,
    answer_draws: Tensor,
    eos_id: int,
) -> Drawn:
    """A completion after each of R prompts, and the words (R, n, K) that its latent steps drew,
    from uniform numbers `(R, n, K)` for these and `(R, W)` for its answer."""
    ids, mask = (tensor.to(model.device) for tensor in pad_prompts(prompts, pad_id=0))
    word_draws, answer_draws = word_draws.to(ids.device), answer_draws.to(ids.device)
    state, words = model.read_prompts(ids, mask), []
    for draws in word_draws.unbind(1):
        words.append(policy.draw(model, state.last_hidden, draws))
        model.advance(state, mean_embeddings(model, words[-1]).unsqueeze(1))
    token = torch.full((len(ids),), model.settings.stop_id, device=ids.device)
    kinds = torch.full_like(token, int(Kind.ANSWER))
    answers = torch.full(answer_draws.shape, eos_id, device=ids.device)
    done = torch.zeros_like(token, dtype=torch.bool)
    for place, draws in enumerate(answer_draws.unbind(1)):
        hidden = model.read_tokens(state, token, thinking=False)
        logits = model.logits(hidden, kinds).float() / policy.temperature
        token = torch.where(done, eos_id, drawn(logits.softmax(-1), draws))
        answers[:, place] = token
        done |= token == eos_id
        if done.all():
            break
    latent = [*[model.settings.continue_id] * len(words), model.settings.stop_id]
    return [(*latent, *_until(eos_id, own)) for own in answers.tolist()], torch.stack(words, 1)


def _until(eos_id: int, ids: list[int]) -> list[int]:
    """Ids up to EOS, which is the last, unless the text was cut off."""
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def score(model: LatentReasoner, chains: Chains, words: Tensor, policy: StepPolicy) -> Pair:
    """Log-probabilities `(R, n + 1 + W)` of the tokens of samples, 0 after their ends, and `(R, n)`
    of their latent steps, which drew `words` `(R, n, K)`."""
    rows, columns = chains.latent_at.T
    inputs = model.embed(chains.input_ids)
    latents = mean_embeddings(model, words).flatten(0, 1).to(inputs.dtype)
    hidden = read_given(model, inputs.index_put((rows, columns), latents), chains.mask)
    of_steps = policy.score(model, hidden[rows, columns - 1], words.flatten(0, 1))
    of_tokens = chains.token_scores(model, hidden, policy.temperature)
    return of_tokens, chains.step_scores(of_steps.to(of_tokens), words.shape[1])


class MtsTask(SampledTask):
    """Learn from rewarded samples of latent steps and answers; n steps for every sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        entry, self.steps = self.entry, self.model.settings.max_latent_steps
        self.policy = StepPolicy(entry.mts.words, entry.mts.ratio, entry.temperature)
        self.of_words = self.steps * self.policy.words
        self.numbers = self.of_words + entry.max_new_tokens - self.steps - 1

    def draw(self, prompts: Sequence[list[int]], uniforms: Tensor, keys: Sequence[str]) -> Drawn:
        """The first numbers of each sample draw its words, the others its answer."""
        of_words, of_answer = uniforms.tensor_split([self.of_words], 1)
        of_words = of_words.unflatten(1, (self.steps, -1))
        eos_id = self.tokenizer.eos_token_id
        return sample(self.model, prompts, self.policy, of_words, of_answer, eos_id)

    def scores(self, chains: Chains, latents: Tensor) -> Pair:
        """`score`, with the words that were drawn."""
        return score(self.model, chains, latents, self.policy)

    def relative(self, earned: Tensor) -> Tensor:
        """By the population's standard deviation."""
        return group_advantages(earned.view(-1, self.entry.group_size)).flatten()

    def surrogate(
        self, scores: Pair, masks: Pair, advantages: Tensor, old: Pair | None
    ) -> LossOutput:
        """One surrogate of latent steps and answers' tokens, weighted by its own denominator."""
        result = policy_loss(
            torch.cat(scores, 1),
            advantages,
            torch.cat(masks, 1),
            kind=self.entry.loss,
            epsilon=self.entry.epsilon,
            kl_weight=0.0,
            max_completion_length=self.entry.max_new_tokens,
            old_log_probs=None if old is None else torch.cat(old, 1),
        )
        metrics = {"clip_share": result.clip_low + result.clip_high}
        return LossOutput(result.loss, float(result.denominator), metrics)


def build(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, MtsTask]:
    """The model that RL starts from, its tokenizer and the task.

    Raises `ConfigError` for a model whose number of latent steps is not fixed, and for settings
    that this policy does not have.
    """
    entry: RivalPolicyModel = run.entry
    parent = run.parents[entry.start]
    model, tokenizer = load(parent, run.device.type), load_tokenizer(parent)
    settings = model.settings
    mixes = isinstance(model.recurrent_filter, SRE)
    if settings is None or settings.stop_rule != "fixed" or not mixes:
        raise ConfigError(
            f"models.{run.name}.from: {entry.start} does not take a fixed number of latent steps "
            "that mix words; start from a model that method: csft has trained"
        )
    check_fixed(run.name, entry, "has no reference model", kl_weight=0.0)
    check_fixed(run.name, entry, f"takes as many steps as {entry.start}", max_latent_steps=None)
    if entry.max_new_tokens < settings.max_latent_steps + 2:
        raise ConfigError(
            f"models.{run.name}.max_new_tokens: {entry.max_new_tokens} leaves no token for the "
            f"answer after {settings.max_latent_steps} latent steps and STOP"
        )
    model.change_settings(allow_rethinking=False)
    return model, tokenizer, policy_task(run, MtsTask, model, tokenizer)
