"""The state of rows that are being read or written: what `LatentReasoner.advance` extends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latent_reasoning.model.blocks import SharedPrefix
from latent_reasoning.model.cache import GrowingCache
from latent_reasoning.runtime.device import to_device


@dataclass
class ReasoningState:
    """Rows being read or written: their cache, and which of its columns hold a token.

    `mask` is `(B, K)`; `last_hidden` `(B, d)` is the hidden state of the last column, after the
    final norm; `prefix` is a text that the rows continue. `full` says that `mask` is known to be
    True everywhere. `progress` `(B,)` is of a gated model (`gated.py`); `noise` `(B, d)` is of the
    next latent input, where the model samples it. `advance` extends a state in place.
    """

    cache: GrowingCache
    mask: Tensor
    last_hidden: Tensor | None = None
    prefix: SharedPrefix | None = None
    full: bool = False
    progress: Tensor | None = None
    noise: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """The number of tokens (B,) that each row has read, those of its `prefix` included."""
        own = self.mask.sum(1)
        return own if self.prefix is None else own + self.prefix.mask.sum(1)

    @classmethod
    def empty(cls, mask: Tensor, prefix: SharedPrefix | None = None) -> ReasoningState:
        """The state of rows before their first column; `mask` is `(B, K)` for any K."""
        return cls(GrowingCache(), mask[:, :0], None, prefix, full=True)

    def append(self, mask: Tensor) -> Tensor:
        """Add columns `(B, W)` to the mask; returns their positions, `(B, W)`.

        They count real tokens: columns that a row skips must not shift its positions.
        """
        positions = self.lengths[:, None] + mask.cumsum(1) - 1
        self.mask = torch.cat([self.mask, mask], 1)
        return positions

    def close_gaps(self) -> None:
        """Move each row's tokens to its last columns, in place: no column between two is empty, and
        none before the longest row.

        A base that counts columns (sliding windows, MPT's distances) then counts tokens.
        """
        width = int(self.mask.sum(1).max())
        if width == self.mask.shape[1] and not (self.mask[:, :-1] & ~self.mask[:, 1:]).any():
            return
        order = self.mask.long().argsort(dim=1, stable=True)[:, -width:]
        cache = GrowingCache()
        for layer, entry in enumerate(self.cache.layers):
            keys, values = (_columns(states, order) for states in (entry.keys, entry.values))
            cache.update(keys, values, layer)
        self.cache, self.mask = cache, self.mask.gather(1, order)

    def fork(self) -> ReasoningState:
        """The same state, to be extended without changing this one; no tensor is copied."""
        cache = GrowingCache()
        for layer, entry in enumerate(self.cache.layers):
            cache.update(entry.keys, entry.values, layer)
        return ReasoningState(
            cache, self.mask, self.last_hidden, self.prefix, self.full, self.progress
        )

    def select(self, rows: Tensor, mask: Tensor | None = None) -> ReasoningState:
        """A new state of the given rows `(R,)`, which may repeat; this one does not change.

        `mask` `(R, K)` says which columns the new rows see; None: those they saw before. With a
        `prefix`, rows that are on the device are looked at.
        """
        prefix = None if self.prefix is None else self.prefix.select(rows)
        rows = to_device(rows, self.mask.device)
        cache = GrowingCache()
        for layer, entry in enumerate(self.cache.layers):
            cache.update(
                entry.keys.index_select(0, rows), entry.values.index_select(0, rows), layer
            )
        last_hidden = None if self.last_hidden is None else self.last_hidden.index_select(0, rows)
        return ReasoningState(
            cache,
            self.mask.index_select(0, rows) if mask is None else mask,
            last_hidden,
            prefix,
            self.full and mask is None,
            None if self.progress is None else self.progress.index_select(0, rows),
        )


def tokens_first(mask: Tensor) -> Tensor | None:
    """The order `(R, W)` of columns in which each row's tokens come first, None if they do so."""
    if not bool((~mask[:, :-1] & mask[:, 1:]).any()):
        return None
    return (~mask).long().argsort(dim=1, stable=True)


def in_order(states: Tensor, order: Tensor) -> Tensor:
    """The columns of `states` `(R, W, d)` in another order `(R, W)`."""
    return states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _columns(states: Tensor, order: Tensor) -> Tensor:
    """Some columns `(R, K')` of keys or values `(R, heads, K, s)`."""
    index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
    return torch.gather(states, 2, index)
