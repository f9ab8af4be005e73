"""Entries of `models` that learn from samples: adaptive-length RL, and what policies share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from latent_reasoning.config.fields import (
    IMPORTANT,
    NonNegative,
    Number,
    Positive,
    PositiveInt,
    Section,
)
from latent_reasoning.config.models import TrainedModel


class Reward(Section):
    """Reward of a sample."""

    penalty: Annotated[NonNegative, IMPORTANT] = 1e-4
    """Size of the length penalty if the group meets the requirement."""
    bonus: Annotated[Number | None, IMPORTANT] = 1e-1
    """Coefficient below the requirement, where longer samples earn more; null: no term."""
    accuracy_requirement: Annotated[NonNegative | None, IMPORTANT] = 1.0
    """Correct samples required of a group: <= 1 a share, > 1 a count; null: always the penalty."""


class PolicyModel(TrainedModel):
    """What the entries of the stages that learn from samples have in common."""

    start: str = Field(..., alias="from")
    """The model it starts from."""
    group_size: Annotated[int, Field(ge=2), IMPORTANT] = 16
    """Samples per prompt."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    max_new_tokens: Annotated[PositiveInt, IMPORTANT] = 40
    """Longest completion."""
    max_latent_steps: PositiveInt | None = None
    """STOP is forced after this number of latent steps, outside the loss and in evaluation too;
    null: never."""
    max_prompt_tokens: PositiveInt | None = 100
    """Longer prompts are dropped; null: none."""
    reward: Reward = Field(default_factory=Reward)
    """Reward."""
    loss: Literal["bnpo", "grpo", "dr_grpo"] = "bnpo"
    """Token aggregation. `grpo` and `dr_grpo`: fidelity only."""
    epsilon: Positive = 0.2
    """Clipping range of the ratio."""
    iterations: PositiveInt = 1
    """Updates on the same samples."""
    kl_weight: Annotated[NonNegative, IMPORTANT] = 1e-3
    """beta: weight of the KL to the start model."""


class RlModel(PolicyModel):
    """Adaptive length by GRPO."""

    stage: Literal["rl"] = "rl"
    """Adaptive-length RL."""
    estimator: Literal["sampled", "exact"] = "sampled"
    """Stop lengths in the gradient: `sampled` draws one for each sample, `exact` averages over all
    of them by their known distribution."""
