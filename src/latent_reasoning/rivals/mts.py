"""CoT2's multi-token sampling: a policy over mixtures of words (arXiv 2505.23648; docs/rivals.md).

A latent step draws K words with replacement and reads the mean of their embeddings. Its probability
is exactly known, that of the K words, so that GRPO applies to latent steps as it does to tokens.

P prompts, G samples each, R = P * G rows, n latent steps, K words, T columns, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.given import read_given
from latent_reasoning.model.heads import Targets, target_log_probabilities
from latent_reasoning.model.mixtures import Mixture, drawn
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.special_rows import embedding_matrix, vocabulary_logits

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
        logits = vocabulary_logits(model.base, model.settings, model.special_rows, hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.ratio == "divided_logits":
            logits = logits / self.words
        return logits.log_softmax(-1)

    def draw(self, model: LatentReasoner, hidden: Tensor, uniforms: Tensor) -> Tensor:
        """K words `(R, K)` after states `(R, d)`, from uniform numbers `(R, K)`."""
        probabilities = self.log_probabilities(model, hidden).exp()
        cumulative = probabilities.unsqueeze(1).expand(-1, self.words, -1)
        return drawn(cumulative, uniforms)

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


# ---------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class Samples:
    """R samples: the `words` (R, n, K) of their latent steps, and the tokens after STOP, `answers`
    (R, W), of which the first `lengths` (R,) count: EOS is the last, unless it was cut off."""

    words: Tensor
    answers: Tensor
    lengths: Tensor

    def completions(self, special: LatentSettings) -> list[tuple[int, ...]]:
        """The ids of each after its prompt, which ends in START."""
        latent = (*[special.continue_id] * self.words.shape[1], special.stop_id)
        rows = zip(self.answers.tolist(), self.lengths.tolist(), strict=True)
        return [(*latent, *answer[:length]) for answer, length in rows]


@torch.no_grad()
def sample(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    policy: StepPolicy,
    word_draws: Tensor,
    answer_draws: Tensor,
    eos_id: int,
) -> Samples:
    """A sample after each of R prompts, from uniform numbers `(R, n, K)` for the words of its n
    latent steps and `(R, W)` for its answer."""
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
    lengths = torch.full_like(token, answers.shape[1])
    for place, draws in enumerate(answer_draws.unbind(1)):
        hidden = model.read_tokens(state, token, thinking=False)
        logits = model.logits(hidden, kinds).float() / policy.temperature
        token = torch.where(done, eos_id, drawn(logits.softmax(-1), draws))
        answers[:, place] = token
        lengths = torch.where(~done & (token == eos_id), place + 1, lengths)
        done |= token == eos_id
        if done.all():
            break
    return Samples(torch.stack(words, 1), answers, lengths)


@dataclass(frozen=True)
class Scored:
    """R samples as they are scored, in one parallel pass (R, T); planned on the host.

    `latent_at` are rows and columns of the latent steps, row by row, `answer_at` those of the
    answers' tokens, which are the `targets` (M,) at `places` (M,) of their answers.
    """

    input_ids: Tensor
    mask: Tensor
    latent_at: tuple[Tensor, Tensor]
    answer_at: tuple[Tensor, Tensor]
    places: Tensor
    targets: Targets

    @classmethod
    def plan(
        cls, prompts: Sequence[list[int]], samples: Samples, special: LatentSettings
    ) -> Scored:
        """Sample i continues prompt i, which ends in START."""
        completions = samples.completions(special)
        ids, mask = pad_prompts(
            [[*p, *c] for p, c in zip(prompts, completions, strict=True)], pad_id=0
        )
        latent = (ids == special.continue_id) & mask.bool()
        columns = torch.arange(ids.shape[1])
        is_answer = columns >= ids.shape[1] - samples.lengths.cpu()[:, None]
        rows, places = is_answer.nonzero(as_tuple=True)
        kinds = torch.full_like(rows, int(Kind.ANSWER))
        first = ids.shape[1] - samples.lengths.cpu()[rows]
        targets = Targets.of(ids[rows, places], kinds, special)
        latent_at = latent.nonzero(as_tuple=True)
        return cls(ids, mask, latent_at, (rows, places), places - first, targets)


def score(
    model: LatentReasoner, scored: Scored, words: Tensor, width: int, policy: StepPolicy
) -> Tensor:
    """Log-probabilities `(R, n + W)` of samples that drew `words` `(R, n, K)`: of their latent
    steps, and of their answers' tokens, 0 after the end. `width` is W."""
    count, steps = words.shape[:2]
    inputs = model.embed(scored.input_ids)
    latents = mean_embeddings(model, words).flatten(0, 1).to(inputs.dtype)
    hidden = read_given(model, inputs.index_put(scored.latent_at, latents), scored.mask)
    rows, columns = scored.latent_at
    of_steps = policy.score(model, hidden[rows, columns - 1], words.flatten(0, 1))
    rows, columns = scored.answer_at
    of_tokens = target_log_probabilities(
        model, hidden[rows, columns - 1], scored.targets, policy.temperature
    )
    of_answers = of_tokens.new_zeros(count, width).index_put((rows, scored.places), of_tokens)
    return torch.cat([of_steps.view(count, steps).to(of_answers), of_answers], 1)
