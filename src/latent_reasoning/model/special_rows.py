"""Special tokens' rows in modules of their own, beside frozen embedding matrices.

With LoRA the embeddings stay frozen, yet the special tokens' rows must learn (docs/method.md,
section 3, `lora_mode`). Tied matrices share one module per token; untied ones have input rows for
START and END and output rows for START, CONTINUE and STOP. The rows of the matrices that have a
module are then zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from latent_reasoning.model.bases import adjusted_logits, scaled_rows
from latent_reasoning.model.passes import SpecialIds

TIED_NAMES = ("start", "end", "continue", "stop")
UNTIED_NAMES = ("start_in", "end_in", "start_out", "continue_out", "stop_out")


def is_tied(base: PreTrainedModel) -> bool:
    """Whether the input and output embeddings are one matrix."""
    return base.get_output_embeddings().weight is base.get_input_embeddings().weight


class SpecialRows(nn.Module):
    """One `(1, d)` embedding per row; parameters are named `special_rows.{name}.weight`."""

    def __init__(self, hidden_size: int, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        for name in TIED_NAMES if tied else UNTIED_NAMES:
            self.add_module(name, nn.Embedding(1, hidden_size))

    def input_row(self, token: str) -> Tensor:
        """`(d,)` row of the input matrix: `token` is start or end."""
        return self.get_submodule(token if self.tied else f"{token}_in").weight[0]

    def output_row(self, token: str) -> Tensor:
        """`(d,)` row of the output matrix: `token` is start, continue or stop."""
        return self.get_submodule(token if self.tied else f"{token}_out").weight[0]


@lru_cache
def ids_on(device: torch.device, *ids: int) -> Tensor:
    """Token ids (N,) on a device: copied there once, since a copy would wait for the device."""
    return torch.tensor(ids, device=device)


def token_id(special: SpecialIds, token: str) -> int:
    """Id of `token`: start, end, continue or stop."""
    return getattr(special, f"{token}_id")


def vocabulary_logits(
    base: PreTrainedModel, special: SpecialIds | None, rows: SpecialRows | None, hidden: Tensor
) -> Tensor:
    """Unmasked logits `(.., V)` of states `(.., d)`, the special tokens' own rows included."""
    head = base.get_output_embeddings()
    logits = head(hidden)
    if rows is not None:
        tokens = ["start", "continue", "stop"] + (["end"] if rows.tied else [])
        ids = ids_on(hidden.device, *(token_id(special, token) for token in tokens))
        own = torch.stack([rows.output_row(token) for token in tokens])
        bias = getattr(head, "bias", None)
        bias = None if bias is None else bias.index_select(0, ids)
        own_logits = functional.linear(hidden, own, bias).to(logits.dtype)
        logits.index_copy_(-1, ids, own_logits)
    return adjusted_logits(base, logits)


def embedding_matrix(
    base: PreTrainedModel, special: SpecialIds | None, rows: SpecialRows | None
) -> Tensor:
    """Input embeddings `(V, d)` as a token gets them, the special tokens' own rows included."""
    matrix = base.get_input_embeddings().weight
    if rows is None:
        return scaled_rows(base, matrix)
    tokens = ["start", "end"] + (["continue", "stop"] if rows.tied else [])
    own = torch.stack([rows.input_row(token) for token in tokens])
    ids = ids_on(matrix.device, *(token_id(special, token) for token in tokens))
    return scaled_rows(base, matrix.index_copy(0, ids, own))


@torch.no_grad()
def extract_rows(base: PreTrainedModel, special: SpecialIds) -> SpecialRows:
    """Move the special rows of the matrices into a `SpecialRows`; in the matrices they become 0.

    Untied matrices keep the rows that have no module: soft re-embedding reads some of them.
    """
    weight = base.get_input_embeddings().weight
    rows = SpecialRows(weight.shape[1], is_tied(base)).to(weight)
    for row, matrix, token in _places(base, special, rows):
        row.copy_(matrix[token])
        matrix[token] = 0
    return rows


def _places(
    base: PreTrainedModel, special: SpecialIds, rows: SpecialRows
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Each of the `rows` `(d,)`, the matrix that it belongs to, and its token's id."""
    for name, module in rows.named_children():
        is_output = name.endswith("_out")
        table = base.get_output_embeddings() if is_output else base.get_input_embeddings()
        yield module.weight[0], table.weight, token_id(special, name.split("_")[0])


@torch.no_grad()
def moved_rows(
    base: PreTrainedModel, special: SpecialIds, rows: SpecialRows | None
) -> SpecialRows | None:
    """Move the special rows to the other place: out of the matrices, or (`rows`) back into them."""
    if rows is None:
        return extract_rows(base, special)
    for row, matrix, token in _places(base, special, rows):
        matrix[token] = row
    return None
