"""A latent step whose input is made by attention over all states so far (`attention`).

As in reinforced latent reasoning for recommendation (docs/rivals.md): the other filters see the
last state alone. Keys and values of the final states, of text and latent steps alike, lie in the
cache behind those of the blocks, so that whatever selects, joins or shares rows does so with them.

R rows, W new columns, d hidden size, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from latent_reasoning.model.blocks import additive_mask, grouped_attention
from latent_reasoning.model.cache import GrowingCache
from latent_reasoning.model.state import ReasoningState

RMS_NORM_EPS = 1e-6


class AttentionSource(nn.Module):
    """An attention layer over final states, whose result is aligned with the embeddings.

    Values begin as the states, the output as `E^T E / V`, and the result has the mean length of an
    embedding (`linear_ECF`'s beginning); `embeddings` is `E` `(V, d)`. `layer` is the place of its
    keys and values in a cache: the number of the base's blocks.
    """

    def __init__(self, embeddings: Tensor, heads: int, layer: int) -> None:
        super().__init__()
        vocabulary_size, size = embeddings.shape
        self.heads, self.layer = heads, layer
        self.query, self.key, self.value, self.output = (
            nn.Linear(size, size, bias=False) for _ in range(4)
        )
        self.norm = nn.RMSNorm(size, eps=RMS_NORM_EPS)
        with torch.no_grad():
            for projection in (self.query, self.key):
                nn.init.xavier_uniform_(projection.weight)
            self.value.weight.copy_(torch.eye(size))
            self.output.weight.copy_(embeddings.T @ embeddings / vocabulary_size)
            self.norm.weight.fill_(embeddings.norm(dim=-1).mean() / math.sqrt(size))

    def remember(self, hidden: Tensor, cache: GrowingCache) -> None:
        """Add new columns' states `(R, W, d)` to those that later steps attend to."""
        cache.update(self._apart(self.key(hidden)), self._apart(self.value(hidden)), self.layer)

    def forward(self, hidden: Tensor, state: ReasoningState) -> Tensor:
        """The next inputs `(R, d)` of rows whose last states are `hidden` `(R, d)`.

        `state` says what has been read so far, the last states included.
        """
        queries = self._apart(self.query(hidden).unsqueeze(1))
        entry = state.cache.layers[self.layer]
        visible = None if state.full else additive_mask(state.mask, queries.dtype)[:, None]
        mixed = grouped_attention(
            queries / math.sqrt(queries.shape[-1]),
            entry.keys,
            entry.values,
            visible,
            state.prefix,
            self.layer,
        )
        return self.norm(self.output(mixed.transpose(1, 2).flatten(2))[:, 0])

    def _apart(self, states: Tensor) -> Tensor:
        """(R, W, H * s) -> (R, H, W, s)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
