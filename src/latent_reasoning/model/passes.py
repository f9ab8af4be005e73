"""How a batch of sequences is cut into passes through the base model.

A sequence is an alternation of text runs and latent runs (docs/method.md, section 3)::

    question <START> | <CONTINUE> <CONTINUE> .. | <STOP> answer .. <START> | <CONTINUE> .. | ..
    text run 0         latent run 0               text run 1                 latent run 1

A text run is one pass; a latent run needs a pass for each step, because a step's input is the
hidden state of the position before. `plan_passes` cuts all rows at once: their r-th text runs share
a pass, aligned at their ends (the last state starts the latent run), and their j-th latent steps
share a pass, in which rows with fewer steps are masked. The last latent step also shares its pass
with the text run after it, whose input needs no hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from latent_reasoning.runtime.graphs import Sizes


class Kind(IntEnum):
    """Kind of a position: it decides which tokens may come next."""

    PADDING = 0
    TEXT = 1
    """Ordinary position before any latent step."""
    THINKING = 2
    """START or CONTINUE: the next token is CONTINUE or STOP."""
    ANSWER = 3
    """STOP, or an ordinary position after one."""


class SpecialIds(Protocol):
    """Ids of the four special tokens."""

    @property
    def start_id(self) -> int: ...

    @property
    def end_id(self) -> int: ...

    @property
    def continue_id(self) -> int: ...

    @property
    def stop_id(self) -> int: ...


@dataclass(frozen=True)
class Pass:
    """One pass: at most one latent step, then `W` text tokens, for `R` rows.

    `rows` are the rows of the previous pass that continue (None: all); `latent` says whether the
    first column is a latent step, fed by the last column of the previous pass; `token_ids` is
    `(R, W)`; `mask` `(R, latent + W)` is False where a row has nothing in that column, and `full`
    says that it is True everywhere. `packed` are the flat indices of its tokens where they are read
    one after the other (`packing.py`).
    """

    rows: Tensor | None
    latent: bool
    token_ids: Tensor
    mask: Tensor
    full: bool
    packed: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor | None, latent: bool, token_ids: Tensor, mask: Tensor) -> Pass:
        """A pass planned on the host."""
        return cls(rows, latent, token_ids, mask, bool(mask.all()))


@dataclass(frozen=True)
class PassPlan:
    """All passes of a batch `(B, T)` and the way back to its layout.

    `index` `(B, T)` points into the concatenated columns of all passes, each flattened row by row;
    it is None where a single pass has the layout of the batch itself. Padding points at 0. `kinds`
    `(B, T)` holds the `Kind` of each position.
    """

    passes: list[Pass]
    index: Tensor | None
    kinds: Tensor


def plan_passes(
    input_ids: Tensor,
    attention_mask: Tensor,
    special: SpecialIds | None,
    keep_rows: bool = False,
    sizes: Sizes | None = None,
) -> PassPlan:
    """Cut a batch `(B, T)` on the CPU into passes; `special` None means a plain language model.

    Padding may be on either side. `keep_rows` carries finished rows along, so that the state after
    the last pass covers all rows. `sizes` lengthen latent runs and widen text runs, to have few
    shapes. Raises `ValueError` where a sequence is illegal: CONTINUE or STOP
    without START, START or CONTINUE followed by anything else, END in the input, or padding between
    tokens (conformance note 11).
    """
    mask = attention_mask.bool()
    begins = mask.clone()
    begins[:, 1:] &= ~mask[:, :-1]
    if (begins.sum(1) > 1).any():
        raise ValueError("padding may not stand between the tokens of a row")
    if special is None:
        return PassPlan([Pass.of(None, False, input_ids, mask)], None, mask.long() * Kind.TEXT)
    is_continue = mask & (input_ids == special.continue_id)
    is_stop = mask & (input_ids == special.stop_id)
    run, kinds = is_stop.cumsum(1), kinds_of(input_ids, mask, special)
    if not is_continue.any() and not is_stop.any():
        return PassPlan([Pass.of(None, False, input_ids, mask)], None, kinds)
    passes, index = _cut(input_ids, mask, is_continue, run, keep_rows, sizes)
    return PassPlan(passes, index, kinds)


def kinds_of(input_ids: Tensor, mask: Tensor, special: SpecialIds) -> Tensor:
    """The `Kind` of each position `(B, T)`; `mask` is bool. Raises as `plan_passes`."""
    is_continue = mask & (input_ids == special.continue_id)
    is_stop = mask & (input_ids == special.stop_id)
    thinking = is_continue | (mask & (input_ids == special.start_id))
    _check_legal(input_ids, mask, thinking, is_continue | is_stop, special)
    kinds = torch.where(is_stop.cumsum(1) > 0, int(Kind.ANSWER), int(Kind.TEXT))
    return torch.where(thinking, int(Kind.THINKING), kinds) * mask


def _check_legal(
    input_ids: Tensor, mask: Tensor, thinking: Tensor, decided: Tensor, special: SpecialIds
) -> None:
    """Raise `ValueError` at the first position that breaks the grammar of latent sequences."""
    expected = torch.zeros_like(thinking)
    expected[:, 1:] = thinking[:, :-1]
    is_end = input_ids == special.end_id
    illegal = (mask & ((decided != expected) | is_end)).nonzero()
    if not len(illegal):
        return
    row, position = illegal[0].tolist()
    if is_end[row, position]:
        problem = "END is never part of a sequence"
    elif decided[row, position]:
        problem = "CONTINUE and STOP need START or CONTINUE before them"
    else:
        problem = "only CONTINUE or STOP may follow START and CONTINUE"
    raise ValueError(
        f"illegal latent sequence in row {row}, position {position}, "
        f"token {int(input_ids[row, position])}: {problem}"
    )


def _cut(
    input_ids: Tensor,
    mask: Tensor,
    is_continue: Tensor,
    run: Tensor,
    keep_rows: bool,
    sizes: Sizes | None,
) -> tuple[list[Pass], Tensor]:
    """Passes and index of a batch in which at least one row has CONTINUE or STOP."""
    passes: list[Pass] = []
    index = torch.zeros_like(input_ids)
    columns_before = 0
    rows = torch.arange(len(input_ids))
    for r in range(int(run.max()) + 2):
        text = mask & ~is_continue & (run == r)
        latent = is_continue & (run == r - 1)
        if not text.any() and not latent.any():
            break
        unfinished = (text | latent)[rows].any(1)
        kept = None
        if not keep_rows and not unfinished.all():
            kept = unfinished.nonzero()[:, 0]
            rows = rows[kept]
        text, latent, ids, at = text[rows], latent[rows], input_ids[rows], index[rows]
        steps = latent.sum(1)
        step_of, longest = latent.cumsum(1) - 1, int(steps.max())
        lengths = text.sum(1)
        width = int(lengths.max())
        if sizes is not None:
            longest, width = sizes(f"steps {r}", longest), sizes(f"text {r}", width)
        text_column = width - lengths[:, None] + text.cumsum(1) - 1
        tokens = torch.zeros(len(rows), width, dtype=input_ids.dtype)
        text_mask = torch.zeros(len(rows), width, dtype=torch.bool)
        row_of, position = text.nonzero(as_tuple=True)
        tokens[row_of, text_column[row_of, position]] = ids[row_of, position]
        text_mask[row_of, text_column[row_of, position]] = True
        count = torch.arange(len(rows))[:, None]
        for step in range(longest - 1):
            passes.append(Pass.of(kept, True, tokens[:, :0], (steps > step)[:, None]))
            at = torch.where(latent & (step_of == step), columns_before + count, at)
            columns_before += len(rows)
            kept = None
        has_latent = longest > 0
        last_mask = torch.cat([(steps >= longest)[:, None], text_mask], 1)
        passes.append(Pass.of(kept, has_latent, tokens, last_mask if has_latent else text_mask))
        offset = columns_before + count * (width + has_latent)
        at = torch.where(latent & (step_of == longest - 1), offset, at)
        index[rows] = torch.where(text, offset + has_latent + text_column, at)
        columns_before += len(rows) * (width + has_latent)
    return passes, index
