"""Mixtures of words: distributions over the vocabulary, fed as the mean of their embeddings.

Latent-SFT, Soft Thinking and CoT2 differ in how many words a mixture holds and in how it is cut;
what they feed is the same (docs/rivals.md). Soft re-embedding (`filters.SRE`) mixes all words.

V vocabulary, d hidden size, k words in a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Distributions over k words each: `probabilities` and `ids` are (.., k).

    A word of probability 0 may have any id: it only makes up the number.
    """

    probabilities: Tensor
    ids: Tensor

    def embed(self, matrix: Tensor) -> Tensor:
        """The mean embedding `(.., d)` by rows of a matrix `(V, d)`."""
        rows = matrix[self.ids]
        return (self.probabilities.to(rows.dtype).unsqueeze(-2) @ rows).squeeze(-2)

    def select(self, rows: Tensor) -> Mixture:
        """Some of the mixtures."""
        return Mixture(self.probabilities[rows], self.ids[rows])

    def perturbed(self, noise: Tensor, temperature: float = 1.0) -> Mixture:
        """The mixture `softmax((log q + noise) / temperature)`, for noise `(.., k)`: with that of
        Gumbel's distribution, a sample of Gumbel-softmax."""
        logits = (self.probabilities + SMALLEST).log() + noise
        return Mixture((logits / temperature).softmax(-1), self.ids)


SMALLEST = 1e-10
"""Added to a probability before its logarithm (the public code of Latent-SFT)."""


def likeliest(logits: Tensor, size: int, temperature: float = 1.0) -> Mixture:
    """The `size` likeliest words of logits `(.., V)`, the likeliest first: a softmax among them."""
    highest, ids = logits.topk(min(size, logits.shape[-1]), dim=-1)
    return Mixture((highest / temperature).softmax(-1), ids)


def truncated(probabilities: Tensor, top_k: int | None, top_p: float, min_p: float) -> Tensor:
    """Distributions `(.., V)` without their unlikely words, normalised after each cut.

    In this order: the `top_k` likeliest words (None: all); the fewest words that have `top_p` of
    the probability together; words of at least `min_p` of the likeliest one's probability.
    """
    if top_k is not None and top_k < probabilities.shape[-1]:
        lowest = probabilities.topk(top_k, dim=-1).values[..., -1:]
        probabilities = _normalised(probabilities, probabilities >= lowest)
    if top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before < top_p)
        probabilities = _normalised(probabilities, kept)
    if min_p > 0:
        floor = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = _normalised(probabilities, probabilities >= floor)
    return probabilities


def _normalised(probabilities: Tensor, kept: Tensor) -> Tensor:
    probabilities = probabilities.masked_fill(~kept, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropies `(..)` in nats of distributions `(.., V)`."""
    return torch.special.entr(probabilities).sum(-1)


def drawn(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Words `(..)` of distributions `(.., V)`, drawn by uniform numbers in [0, 1) `(..)`: the first
    whose cumulative probability exceeds the number."""
    cumulative = probabilities.double().cumsum(-1)
    wanted = uniforms.double().unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
