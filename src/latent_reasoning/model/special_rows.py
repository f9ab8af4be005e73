"""Special tokens' rows in modules of their own, beside frozen embedding matrices.

With LoRA the embeddings stay frozen, yet the special tokens' rows must learn (docs/method.md,
section 3, `lora_mode`). Tied matrices share one module per token; untied ones have input rows for
START and END and output rows for START, CONTINUE and STOP. The rows of the matrices that have a
module are then zero.
"""

from __future__ import annotations

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


def extract_rows(base: PreTrainedModel, special: SpecialIds) -> SpecialRows:
    """Move the special rows of the matrices into a `SpecialRows`; in the matrices they become 0.

    Untied matrices keep the rows that have no module: soft re-embedding reads some of them.
    """
    matrix_in = base.get_input_embeddings().weight
    matrix_out = base.get_output_embeddings().weight
    rows = SpecialRows(matrix_in.shape[1], is_tied(base)).to(matrix_in)
    with torch.no_grad():
        for name, module in rows.named_children():
            matrix = matrix_out if name.endswith("_out") else matrix_in
            token = token_id(special, name.split("_")[0])
            module.weight[0] = matrix[token]
            matrix[token] = 0
    return rows


def fold_rows(base: PreTrainedModel, special: SpecialIds, rows: SpecialRows) -> None:
    """Write `rows` back into the matrices of `base`."""
    matrix_in = base.get_input_embeddings().weight
    matrix_out = base.get_output_embeddings().weight
    with torch.no_grad():
        for name, module in rows.named_children():
            matrix = matrix_out if name.endswith("_out") else matrix_in
            matrix[token_id(special, name.split("_")[0])] = module.weight[0]


def moved_rows(
    base: PreTrainedModel, special: SpecialIds, rows: SpecialRows | None
) -> SpecialRows | None:
    """Move the special rows to the other place: out of the matrices, or (`rows`) back into them."""
    if rows is None:
        return extract_rows(base, special)
    fold_rows(base, special, rows)
    return None
