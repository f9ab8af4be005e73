"""How a batch will be read: all that depends on its rows, decided on the host beforehand.

Whatever decides about shapes or kernels (how rows are cut into passes, where nothing is padded,
which states are kept) follows from lengths and ids, which the host has. Decided here, it costs no
look at a tensor on the device, for which a GPU would have to finish all that it was given before.

B rows, T positions.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from latent_reasoning.model.packing import token_places
from latent_reasoning.model.parts import TextStates, cut_rows, first_needed_column
from latent_reasoning.model.passes import Pass, SpecialIds, plan_passes
from latent_reasoning.runtime.graphs import Sizes


@dataclass(frozen=True)
class ReasonerOutput:
    """States of a batch in its own layout; values at padding are meaningless.

    `last_hidden` `(B, T, d)` is after the final norm. `hidden_states` are L + 1 tensors, embeddings
    first, the last one after the final norm: `(B, T, d)`, or `(M, d)` where `hidden_at` selects M
    positions (row by row). `kinds` `(B, T)` holds the `Kind` of each position.
    """

    last_hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None
    kinds: Tensor


class Reader(Protocol):
    """What planning has to know of a model."""

    @property
    def settings(self) -> SpecialIds | None:
        """Its special tokens; None for a plain language model."""

    @property
    def allowance(self) -> float:
        """Positions of padding in a pass that are not worth another one."""

    @property
    def remembers(self) -> bool:
        """Whether latent steps attend to the final states of all that was read."""

    @property
    def sizes(self) -> Sizes | None:
        """Sizes that batches are padded to; None: as they are."""


def sizes_of(model: Reader, place: str) -> contextlib.AbstractContextManager[None]:
    """In this block, sizes that batches of `model` are padded to are those of a `place`."""
    return contextlib.nullcontext() if model.sizes is None else model.sizes.of(place)


@dataclass(frozen=True)
class FirstPart:
    """Rows of the first pass that are read together, in the columns that they use.

    Final states are needed from column `first_read` of these on; `full` says that none is padding,
    `causal` that no padding stands before a token, so that no token can see any.
    """

    rows: Tensor | slice
    columns: slice
    first_read: int
    full: bool
    causal: bool


@dataclass(frozen=True)
class Reading:
    """A batch `(B, T)` cut into passes; on the host, or moved to the device that reads it.

    `parts` cut the first pass, where it begins the text; None: the rows continue a text read
    before. `index` leads from the positions that are wanted to the columns of all passes; None: a
    single pass has them in order. `chosen` does so for the states of all layers, where only some
    are wanted. `kinds` `(B, T)` holds the `Kind` of each position.
    """

    passes: list[Pass]
    parts: list[FirstPart] | None
    index: Tensor | None
    chosen: Tensor | None
    kinds: Tensor


def plan_reading(
    model: Reader,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    hidden_at: Tensor | None = None,
    continues: bool = False,
) -> Reading:
    """Plan the forward of a batch, of whose positions all states are wanted.

    `hidden_at` `(B, T)` says of which positions the states of all layers are wanted, if not of all.
    Rows that `continues` go on from a text read before. Raises `ValueError` as `plan_passes` does.
    """
    sizes = model.sizes
    ids, mask = input_ids.cpu(), attention_mask.cpu()
    plan = plan_passes(ids, mask, model.settings, keep_rows=sizes is not None, sizes=sizes)
    index = None if plan.index is None else plan.index.flatten()
    chosen = None
    if hidden_at is not None:
        chosen = hidden_at.cpu().flatten().nonzero()[:, 0]
        chosen = chosen if index is None else index[chosen]
        if sizes is not None:
            chosen = padded(chosen, sizes("chosen", len(chosen)))
    parts = None if continues else _parts(model, plan.passes[0], "all")
    return Reading(_of_few_shapes(plan.passes, sizes), parts, index, chosen, plan.kinds)


def plan_prompts(
    model: Reader,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    last: bool = True,
) -> Reading:
    """Plan the reading of texts that are continued; of each, the `last` token's state is wanted."""
    input_ids, attention_mask = input_ids.cpu(), attention_mask.cpu()
    plan = plan_passes(input_ids, attention_mask, model.settings, keep_rows=True)
    # The last column is masked for a row whose last token is in an earlier column.
    last_token = (attention_mask * torch.arange(input_ids.shape[1])).argmax(1)
    index = torch.arange(input_ids.numel()).view(input_ids.shape)
    index = index if plan.index is None else plan.index
    index = index.gather(1, last_token[:, None])[:, 0]
    wanted: TextStates = "last" if last or len(plan.passes) > 1 else "none"
    wanted = "all" if model.remembers else wanted
    parts = _parts(model, plan.passes[0], wanted)
    passes = _of_few_shapes(plan.passes, model.sizes)
    return Reading(passes, parts, index if last else None, None, plan.kinds)


def padded(values: Tensor, count: int) -> Tensor:
    """`values` (N, ..) as `count` of them: the first one stands in for those that there are not."""
    return torch.cat([values, values[:1].expand(count - len(values), *values.shape[1:])])


def _of_few_shapes(passes: list[Pass], sizes: Sizes | None) -> list[Pass]:
    """Where there are to be few shapes, no pass is another one for having nothing padded; of text,
    the tokens are packed."""
    if sizes is None:
        return passes
    return [
        replace(step, full=False, packed=None if step.latent else token_places(step.mask, sizes))
        for step in passes
    ]


def _parts(model: Reader, first: Pass, text_states: TextStates) -> list[FirstPart]:
    if model.sizes is not None:
        width = first.mask.shape[1]
        begins_with_tokens = bool(first.mask[:, 0].all())
        first_read = width if text_states == "none" else 0
        return [FirstPart(slice(None), slice(None), first_read, False, begins_with_tokens)]
    parts = []
    for rows, columns in cut_rows(first.mask, model.allowance):
        mask = first.mask[rows, columns]
        needed, full = first_needed_column(mask, text_states), bool(mask.all())
        parts.append(FirstPart(rows, columns, needed, full, full))
    return parts
