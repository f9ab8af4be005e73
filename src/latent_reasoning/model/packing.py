"""Rows of a text without their padding: what looks at one token at a time reads no other.

Rows of a batch differ in length, and a GPU reads them in one pass of few shapes: half of its
columns are padding. Products, norms and gates read the tokens alone, one after the other; attention
reads them in their rows.

R rows, W columns, N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latent_reasoning.runtime.graphs import Sizes


def token_places(mask: Tensor, sizes: Sizes) -> Tensor:
    """Flat indices (N,) of the tokens of `mask` (R, W) on the host, in one of few `sizes`: R * W
    stands where the number is only made up."""
    tokens = mask.flatten().nonzero()[:, 0]
    more = sizes("tokens", len(tokens)) - len(tokens)
    return torch.cat([tokens, tokens.new_full((more,), mask.numel())])


class Packing(NamedTuple):
    """Tokens of R rows of W columns, one after the other; `tokens` (N,) are their places."""

    tokens: Tensor
    rows: int
    width: int

    def packed(self, states: Tensor) -> Tensor:
        """(R, W, ..) -> (N, ..)."""
        return states.flatten(0, 1).index_select(0, self.tokens.clamp(max=self._columns - 1))

    def unpacked(self, states: Tensor) -> Tensor:
        """(N, ..) -> (R, W, ..), zero where there is no token; of no states (R, 0, ..)."""
        if not len(states):
            return states.new_zeros(self.rows, 0, *states.shape[1:])
        padded = states.new_zeros(self._columns + 1, *states.shape[1:])
        padded = padded.index_copy(0, self.tokens, states)
        return padded[:-1].unflatten(0, (self.rows, self.width))

    @property
    def _columns(self) -> int:
        return self.rows * self.width
