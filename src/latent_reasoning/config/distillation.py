"""What latent SFT learns beside next tokens: a teacher's states, and to say its steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latent_reasoning.config.fields import IMPORTANT, Count, NonNegative, Positive, Section


class Distillation(Section):
    """Distances between teacher and student states."""

    codi_weight: Annotated[NonNegative, IMPORTANT] = 20.0
    """Weight at the target token; 0: off."""
    meaned_weight: NonNegative = 0.0
    """Weight of the distance of mean reasoning states; 0: off."""
    block_range: Annotated[tuple[Count, Count], Field(strict=False)] | None = None
    """First and last block compared (0-based, inclusive); null: all."""
    distance: Literal["smooth_l1", "l1", "l2"] = "smooth_l1"
    """Elementwise loss. `l1` and `l2`: fidelity only."""
    normalise: Literal["layerwise_std", "layerwise_variance", "std", "none"] = "layerwise_std"
    """Divide by the std or the variance of the teacher's states of each block, by the std of all
    blocks, or not at all. `layerwise_variance`, `std` and `none`: fidelity only."""
    include_embedding_layer: bool = False
    """The input embeddings are compared too, as one more block (CODI)."""
    teacher_loss_weight: NonNegative = 1.0
    """Weight of the teacher's own cross-entropy, where one set of weights is teacher and
    student."""
    teacher: str = "self"
    """`self`: one set of weights is teacher and student; or the name of a frozen `sft` model of
    form cot, whose target states are computed once."""
    traces: Literal["data", "teacher"] = "data"
    """The reasoning the teacher reads: the data's steps, or its own traces with a right answer."""

    @model_validator(mode="after")
    def _range_in_order(self) -> Distillation:
        if self.block_range is not None and self.block_range[0] > self.block_range[1]:
            first, last = self.block_range
            raise ValueError(f"block_range: the first block, {first}, comes after the last, {last}")
        return self


class StepDecoder(Section):
    """SIM-CoT: a copy of the base model reads latent inputs and learns to write their steps.

    It is trained with the model, in full, and is not part of the finished model.
    """

    weight: Annotated[Positive, IMPORTANT] = 1.0
    """Weight of its loss."""
    normalise: Literal["tokens", "rows"] = "tokens"
    """The loss of a latent input is the sum over the batch's labels divided by their number
    (published for CODI) or by the number of rows (published for Coconut)."""
