"""The question that teacher and student share is read once, for both.

Up to the question's last token both sides of a row are the same text under the same weights, so
one pass serves both, gradients included (with dropout, they share its noise). Each side then
continues from the question's keys and values.

B rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_reasoning.data.collation import from_column
from latent_reasoning.data.examples import IGNORED_LABEL
from latent_reasoning.model.reading import Reading, plan_prompts
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.graphs import Sizes

SIDES = {
    "": ("input_ids", "attention_mask", "labels", "reasoning_map", "target_token_map"),
    "latent_": ("input_ids", "attention_mask", "labels", "continue_map", "target_token_map"),
}
"""The tensors of a `collate_latent` batch for the teacher and for the student."""


def plan_question(
    model: LatentReasoner, batch: dict[str, Tensor]
) -> tuple[Reading | None, dict[str, Tensor]]:
    """How the shared beginning of each row will be read, and the batch without that beginning.

    The rest of a row begins at the first position whose state a loss reads. Where a row shares
    nothing, or all rows together share fewer tokens than a pass costs, there is None to read and
    the batch is unchanged.
    """
    count, sizes = _shared_tokens(batch), model.sizes
    if not bool((count > 0).all()) or int(count.sum()) < model.pass_cost:
        return None, batch if sizes is None else _padded(batch, torch.zeros_like(count), sizes)
    width = int(count.max())
    ids = _from_first_token(batch, "", width if sizes is None else sizes("question", width))
    mask = torch.arange(ids.shape[1]) < count[:, None]
    reading = plan_prompts(model, ids, mask, last=False)
    return reading, _without(batch, count) if sizes is None else _padded(batch, count, sizes)


def _shared_tokens(batch: dict[str, Tensor]) -> Tensor:
    """The number of tokens (B,) at each row's beginning whose states no loss reads.

    The teacher learns all that follows the question, from the state at the question's last token.
    """
    first_label = (batch["labels"] != IGNORED_LABEL).long().argmax(1)
    return first_label - 1 - _first_token(batch, "")


def _first_token(batch: dict[str, Tensor], side: str) -> Tensor:
    """Column (B,) of each row's first token."""
    return batch[f"{side}attention_mask"].argmax(1)


def _from_first_token(batch: dict[str, Tensor], side: str, width: int) -> Tensor:
    """The first `width` ids (B, `width`) of each row; a shorter row repeats its last id."""
    ids = batch[f"{side}input_ids"]
    columns = _first_token(batch, side)[:, None] + torch.arange(width)
    return ids.gather(1, columns.clamp(max=ids.shape[1] - 1))


def _without(batch: dict[str, Tensor], count: Tensor) -> dict[str, Tensor]:
    """Both sides of the batch without the first `count` (B,) tokens of each row."""
    rest: dict[str, Tensor] = {}
    for side, names in SIDES.items():
        begin = _first_token(batch, side) + count
        narrow = {f"{side}{name}": batch[f"{side}{name}"] for name in names}
        columns = torch.arange(batch[f"{side}input_ids"].shape[1])
        mask = f"{side}attention_mask"
        narrow[mask] = narrow[mask] * (columns >= begin[:, None])
        rest |= {name: tensor[:, int(begin.min()) :] for name, tensor in narrow.items()}
    return rest


def _padded(batch: dict[str, Tensor], count: Tensor, sizes: Sizes) -> dict[str, Tensor]:
    """As `_without`, padded on the right, to one of few widths."""
    rest: dict[str, Tensor] = {}
    for side, names in SIDES.items():
        begin = _first_token(batch, side) + count
        width = sizes(f"{side}text", int((batch[f"{side}input_ids"].shape[1] - begin).max()))
        rest |= from_column(batch, [f"{side}{name}" for name in names], begin, width)
    return rest
