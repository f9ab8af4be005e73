"""CoT2's multi-token sampling: a policy over mixtures of words (arXiv 2505.23648; docs/rivals.md).

A latent step draws K words with replacement and reads the mean of their embeddings. Its probability
is exactly known, that of the K words, so that GRPO applies to latent steps as it does to tokens.

P prompts, G samples each, R = P * G rows, n latent steps, K words, T columns, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latent_reasoning.model.mixtures import Mixture, drawn
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_rows import embedding_matrix, vocabulary_logits

SMALLEST_STD = 1e-12


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
