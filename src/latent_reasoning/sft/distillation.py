"""Distillation losses of latent SFT (docs/method.md, section 4).

The student's hidden states are pulled towards the teacher's: at the target token (`codi`), and in
the mean over the reasoning (`meaned`), which for the teacher are its reasoning tokens and for the
student its CONTINUE positions. Both losses compare all blocks, or those of `block_range`; the
embedding layer is never compared.

B rows, L blocks compared, d hidden size, M selected positions of a batch (row by row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from latent_reasoning.config import Distillation
from latent_reasoning.model.reasoner import LatentReasoner, ReasonerOutput
from latent_reasoning.model.state import ReasoningState

STD_EPSILON = 1e-8
DISTANCES = {
    "smooth_l1": functional.smooth_l1_loss,
    "l1": functional.l1_loss,
    "l2": functional.mse_loss,
}


@dataclass(frozen=True)
class StateSummary:
    """The hidden states of a batch that are compared.

    `target` `(L, B, d)` holds the states at the target token, `mean` `(L, B, d)` the means over the
    reasoning (zero in rows without reasoning); `reasons` `(B,)` is False in such rows.
    """

    target: Tensor
    mean: Tensor
    reasons: Tensor


def read_with_states(
    model: LatentReasoner,
    batch: dict[str, Tensor],
    side: Literal["teacher", "student"],
    distillation: Distillation,
    prefix: ReasoningState | None = None,
) -> tuple[ReasonerOutput, StateSummary | None]:
    """Forward of one side of a `collate_latent` batch, and its states where any are compared.

    The batch stays on the CPU, where the reasoner plans its passes. It continues `prefix`.
    """
    before = "latent_" if side == "student" else ""
    target_map = batch[f"{before}target_token_map"]
    span_map = batch["latent_continue_map" if side == "student" else "reasoning_map"]
    if not distillation.meaned_weight:
        span_map = torch.zeros_like(span_map)
    compared = bool(distillation.codi_weight or distillation.meaned_weight)
    selected = target_map | span_map
    output = model(
        batch[f"{before}input_ids"],
        batch[f"{before}attention_mask"],
        output_hidden_states=compared,
        hidden_at=selected,
        prefix=prefix,
    )
    if not compared:
        return output, None
    selected, target_map, span_map = (
        positions.to(model.device) for positions in (selected, target_map, span_map)
    )
    states, blocks = output.hidden_states, distillation.block_range
    return output, summarise_states(states, selected, target_map, span_map, blocks)


def summarise_states(
    hidden_states: Sequence[Tensor],
    selected: Tensor,
    target_map: Tensor,
    span_map: Tensor,
    block_range: tuple[int, int] | None = None,
) -> StateSummary:
    """Reduce a batch's hidden states to those that are compared.

    `hidden_states` are the embeddings and each block's states, `(M, d)`, at the positions that are
    True in `selected` `(B, T)`: at least those of `target_map` and `span_map`. Raises `ValueError`
    for a row without exactly one target token, or a block that the model lacks.
    """
    if not bool((target_map.sum(1) == 1).all()):
        raise ValueError("each row has exactly one target token")
    blocks = hidden_states[1:]
    first, last = block_range or (0, len(blocks) - 1)
    if last >= len(blocks):
        raise ValueError(
            f"distillation.block_range {first}..{last} does not fit a model whose blocks are "
            f"0..{len(blocks) - 1}"
        )
    states = torch.stack(list(blocks[first : last + 1]))
    row_of, in_span, counts = selected.nonzero()[:, 0], span_map[selected], span_map.sum(1)
    sums = states.new_zeros(len(states), len(selected), states.shape[-1])
    sums = sums.index_add(1, row_of[in_span], states[:, in_span])
    mean = sums / counts.clamp(min=1)[:, None]
    return StateSummary(states[:, target_map[selected]], mean, counts > 0)


def distillation_losses(
    teacher: StateSummary, student: StateSummary, settings: Distillation
) -> dict[str, Tensor]:
    """The losses with a non-zero weight, already weighted: `codi_loss`, `meaned_loss`.

    Their gradient reaches the student alone.
    """
    losses = {}
    if settings.codi_weight:
        distance = _distance(teacher.target, student.target, settings)
        losses["codi_loss"] = settings.codi_weight * distance
    if settings.meaned_weight:
        # A row without teacher reasoning has distance 0, but counts in mean and std (note 15).
        student_mean = student.mean * teacher.reasons[:, None]
        distance = _distance(teacher.mean, student_mean, settings)
        losses["meaned_loss"] = settings.meaned_weight * distance
    return losses


def _distance(teacher: Tensor, student: Tensor, settings: Distillation) -> Tensor:
    """Distance of states `(L, B, d)`: mean over rows and features, normalised; mean over blocks."""
    teacher, student = teacher.detach().float(), student.float()
    elementwise = DISTANCES[settings.distance](student, teacher, reduction="none")
    by_block = elementwise.mean((1, 2))
    if settings.normalise == "layerwise_std":
        by_block = by_block / (teacher.flatten(1).std(1) + STD_EPSILON)
    elif settings.normalise == "std":
        by_block = by_block / (teacher.std() + STD_EPSILON)
    return by_block.mean()
