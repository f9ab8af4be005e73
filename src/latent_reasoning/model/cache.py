"""Key-value caches: one with room to grow, and one whose buffers never move.

transformers' own cache copies everything it holds for each new token. `GrowingCache` writes a new
column in place; with gradients enabled it copies too, because the old tensors belong to the graph.
`StaticCache` is for steps that a GPU repeats without the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32
"""Spare columns that a full cache gets when its buffers grow."""


class _GrowingLayer(DynamicLayer):
    """Keys and values `(B, heads, K, d)` of one block, views of buffers that may be longer."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns all keys and values. The first tensors are kept, not copied."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        elif torch.is_grad_enabled():
            self._buffers = None
            super().update(key_states, value_states)
        else:
            self._write(key_states, value_states)
        return self.keys, self.values

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        before = self.keys.shape[-2]
        length = before + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < length:
            self._buffers = (_enlarged(self.keys, length), _enlarged(self.values, length))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:length] = states
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _enlarged(states: Tensor, length: int) -> Tensor:
    batch, heads, before, size = states.shape
    buffer = states.new_empty(batch, heads, length + ROOM, size)
    buffer[:, :, :before] = states
    return buffer


class GrowingCache(DynamicCache):
    """An empty cache; its layers appear as the model writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = _GrowingLayer


@dataclass(frozen=True)
class StaticCache:
    """The first `columns` of buffers `keys` and `values` `(L, R, heads, K, d)` of all blocks.

    Each row writes one new column, at `at` `(R,)`. What it has in later ones means nothing and must
    be masked.
    """

    keys: Tensor
    values: Tensor
    at: Tensor
    columns: int

    def update(self, key_states: Tensor, value_states: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write a column `(R, heads, 1, d)` of a block; returns its used keys and values."""
        index = self.at[:, None, None, None].expand_as(key_states)
        keys, values = self.keys[layer], self.values[layer]
        keys.scatter_(2, index, key_states.to(keys.dtype))
        values.scatter_(2, index, value_states.to(values.dtype))
        return keys[:, :, : self.columns], values[:, :, : self.columns]
