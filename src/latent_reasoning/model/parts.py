"""Rows of similar length are read in parts, to save padding, and the parts joined again.

B rows, W columns, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from latent_reasoning.model.cache import GrowingCache
from latent_reasoning.model.state import ReasoningState

TextStates = Literal["all", "last", "none"]
"""Which final states of a text are needed."""


@dataclass(frozen=True)
class Part:
    """Rows of a pass that were read together, in the columns that they use."""

    rows: Tensor | slice
    columns: slice
    state: ReasoningState
    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None


def cut_rows(mask: Tensor, allowance: float) -> list[tuple[Tensor | slice, slice]]:
    """Parts of the rows of `mask` `(B, W)` to be read together, and the columns that each uses."""
    everything = [(slice(None), slice(None))]
    parts = rows_of_similar_length(mask, allowance)
    if len(parts) == 1:
        return everything
    used = (mask[rows].any(0).nonzero() for rows in parts)
    return [
        (rows, slice(int(columns[0]), int(columns[-1]) + 1))
        for rows, columns in zip(parts, used, strict=True)
    ]


def rows_of_similar_length(mask: Tensor, allowance: float) -> list[Tensor]:
    """The rows of `mask` `(B, W)` in parts of similar length, longest rows first.

    The rows of a part have at most `allowance` positions of padding in all.
    """
    lengths = mask.sum(1)
    parts: list[list[int]] = []
    padded = 0
    for row in lengths.argsort(descending=True, stable=True).tolist():
        if parts:
            padded += int(lengths[parts[-1][0]] - lengths[row])
        if not parts or padded > allowance:
            parts.append([])
            padded = 0
        parts[-1].append(row)
    return [torch.tensor(rows) for rows in parts]


def join(
    parts: list[Part], mask: Tensor, *, full: bool
) -> tuple[ReasoningState, Tensor, tuple[Tensor, ...] | None]:
    """Join the parts of a pass as if all rows had been read together.

    `mask` is `(B, W)`; `full` says that it is True everywhere.
    """
    order = torch.cat([part.rows for part in parts]).argsort()

    def whole(tensors: Iterable[Tensor]) -> Tensor:
        """Tensors `(R, .., w, d)` of the parts as `(B, .., W, d)`, zero in unused columns."""
        padded = [
            functional.pad(tensor, (0, 0, part.columns.start, mask.shape[1] - part.columns.stop))
            for tensor, part in zip(tensors, parts, strict=True)
        ]
        return torch.cat(padded).index_select(0, order)

    cache = GrowingCache()
    for layer, entries in enumerate(zip(*(part.state.cache.layers for part in parts), strict=True)):
        keys, values = whole(e.keys for e in entries), whole(e.values for e in entries)
        cache.update(keys, values, layer)
    hidden = whole(part.hidden for part in parts)
    hidden_states = None
    if parts[0].hidden_states is not None:
        layers = zip(*(part.hidden_states for part in parts), strict=True)
        hidden_states = tuple(whole(layer) for layer in layers)
    return ReasoningState(cache, mask, hidden[:, -1], full=full), hidden, hidden_states


def first_needed_column(mask: Tensor, text_states: TextStates) -> int:
    """The first column of a text's `mask` `(R, W)` whose state is needed."""
    width = mask.shape[1]
    if text_states == "last":
        columns = torch.arange(width, device=mask.device)
        return int((mask.long() * columns).argmax(1).min())
    return width if text_states == "none" else 0


def gather_states(passes: list[Tensor] | tuple[Tensor, ...], index: Tensor | None) -> Tensor:
    """States of all passes, `(R, W, d)` each, flattened and selected by `index`: `(N, d)`."""
    flat = [states.reshape(-1, states.shape[-1]) for states in passes]
    joined = flat[0] if len(flat) == 1 else torch.cat(flat)
    return joined if index is None else joined.index_select(0, index)
