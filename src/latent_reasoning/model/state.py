"""The state of rows that are being read or written: what `LatentReasoner.advance` extends."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latent_reasoning.model.blocks import SharedPrefix
from latent_reasoning.model.cache import GrowingCache


@dataclass
class ReasoningState:
    """Rows being read or written: their cache, and which of its columns hold a token.

    `mask` is `(B, K)`; `last_hidden` `(B, d)` is the hidden state of the last column, after the
    final norm; `prefix` is a text that the rows continue. `advance` extends a state in place.
    """

    cache: GrowingCache
    mask: Tensor
    last_hidden: Tensor | None = None
    prefix: SharedPrefix | None = None

    def fork(self) -> ReasoningState:
        """The same state, to be extended without changing this one; no tensor is copied."""
        cache = GrowingCache()
        for layer, entry in enumerate(self.cache.layers):
            cache.update(entry.keys, entry.values, layer)
        return ReasoningState(cache, self.mask, self.last_hidden, self.prefix)

    def select(self, rows: Tensor, mask: Tensor | None = None) -> ReasoningState:
        """A new state of the given rows `(R,)`, which may repeat; this one does not change.

        `mask` `(R, K)` says which columns the new rows see; None: those they saw before.
        """
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
            None if self.prefix is None else self.prefix.select(rows),
        )
