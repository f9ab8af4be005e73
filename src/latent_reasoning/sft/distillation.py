"""Distillation losses of latent SFT (docs/method.md, section 4).

The student's hidden states are pulled towards the teacher's: at the target token (`codi`), and in
the mean over the reasoning (`meaned`), which for the teacher are its reasoning tokens and for the
student its CONTINUE positions. Both losses compare all blocks, or those of `block_range`; the
embedding layer only where `include_embedding_layer` asks for it (CODI, arXiv 2502.21074).

B rows, L blocks compared, d hidden size, M selected positions of a batch (row by row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from latent_reasoning.config import ConfigError, Distillation
from latent_reasoning.model.reading import Reading, ReasonerOutput, padded, plan_reading
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.runtime.graphs import Sizes
from latent_reasoning.training.text import Labels

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


@dataclass(frozen=True)
class Compared:
    """Which of a batch's M selected states are compared, as places among them.

    `target` (B,) is the place of each row's target token; `span` (S,) those of the reasoning, with
    the row of each in `span_rows`; `counts` (B,) says how many a row has. A place that only makes
    up the number belongs to row B.
    """

    target: Tensor
    span: Tensor
    span_rows: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls, selected: Tensor, target_map: Tensor, span_map: Tensor, sizes: Sizes | None = None
    ) -> Compared:
        """From maps `(B, T)` on the host; states are selected row by row where `selected` is True.

        Raises `ValueError` for a row without exactly one target token.
        """
        if not bool((target_map.sum(1) == 1).all()):
            raise ValueError("each row has exactly one target token")
        row_of, in_span = selected.nonzero()[:, 0], span_map[selected]
        target = target_map[selected].nonzero()[:, 0]
        span, span_rows = in_span.nonzero()[:, 0], row_of[in_span]
        if sizes is not None:
            count = sizes("span", len(span))
            span_rows = functional.pad(span_rows, (0, count - len(span)), value=len(selected))
            span = padded(span, count)
        return cls(target, span, span_rows, span_map.sum(1))


@dataclass(frozen=True)
class Side:
    """One side of a batch, teacher or student, as it will be read; planned on the host.

    `labels` are what it learns; `compared` is None where no states are.
    """

    reading: Reading
    labels: Labels
    compared: Compared | None

    @classmethod
    def plan(
        cls,
        model: LatentReasoner,
        batch: dict[str, Tensor],
        side: Literal["teacher", "student"],
        distillation: Distillation,
        *,
        continues: bool = False,
    ) -> Side:
        """Plan one side of a `collate_latent` batch, which may continue a question read before."""
        before = "latent_" if side == "student" else ""
        target_map = batch[f"{before}target_token_map"]
        span_map = batch["latent_continue_map" if side == "student" else "reasoning_map"]
        if not distillation.meaned_weight:
            span_map = torch.zeros_like(span_map)
        selected = target_map | span_map
        compares = bool(distillation.codi_weight or distillation.meaned_weight)
        reading = plan_reading(
            model,
            batch[f"{before}input_ids"],
            batch[f"{before}attention_mask"],
            hidden_at=selected if compares else None,
            continues=continues,
        )
        sizes = model.sizes
        labels = Labels.of(batch[f"{before}labels"], reading.kinds, model.settings, sizes)
        compared = Compared.of(selected, target_map, span_map, sizes) if compares else None
        return cls(reading, labels, compared)


def read_with_states(
    model: LatentReasoner,
    side: Side,
    distillation: Distillation,
    prefix: ReasoningState | None = None,
) -> tuple[ReasonerOutput, StateSummary | None]:
    """Forward of a planned side on the model's device, and its states where any are compared.

    It continues `prefix`.
    """
    compares = side.compared is not None
    output = model.run(side.reading, output_hidden_states=compares, prefix=prefix)
    if not compares:
        return output, None
    return output, summarise_states(output.hidden_states, side.compared, distillation)


def summarise_states(
    hidden_states: Sequence[Tensor], compared: Compared, settings: Distillation
) -> StateSummary:
    """Reduce a batch's hidden states to those that are compared.

    `hidden_states` are the embeddings and each block's states, `(M, d)`, at the selected positions.
    Raises `ConfigError` for a block that the model lacks.
    """
    embeddings, *blocks = hidden_states
    first, last = settings.block_range or (0, len(blocks) - 1)
    if last >= len(blocks):
        raise ConfigError(
            f"distillation.block_range: {first}..{last} does not fit a model whose blocks are "
            f"0..{len(blocks) - 1}"
        )
    before = [embeddings] if settings.include_embedding_layer else []
    states, counts = torch.stack([*before, *blocks[first : last + 1]]), compared.counts
    sums = states.new_zeros(len(states), len(counts) + 1, states.shape[-1])
    sums = sums.index_add(1, compared.span_rows, states[:, compared.span])[:, :-1]
    mean = sums / counts.clamp(min=1)[:, None]
    return StateSummary(states[:, compared.target], mean, counts > 0)


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
    elif settings.normalise == "layerwise_variance":
        by_block = by_block / (teacher.flatten(1).std(1) + STD_EPSILON) ** 2
    elif settings.normalise == "std":
        by_block = by_block / (teacher.std() + STD_EPSILON)
    return by_block.mean()
