"""Entries of `models` that train or decode by another published method (docs/rivals.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latent_reasoning.config.fields import (
    Count,
    Positive,
    Section,
    Share,
    only_when,
    science_for,
)
from latent_reasoning.config.models import Model, SupervisedModel
from latent_reasoning.config.policies import PolicyModel


class CurriculumModel(SupervisedModel):
    """Supervised training whose sequences change by stages: steps leave the text one by one."""

    stage: Literal["curriculum"] = "curriculum"
    """A curriculum."""
    method: Literal["coconut", "pause", "no_thought", "icot"] = "coconut"
    """What takes the place of the text that is removed."""
    model: Model = Field(default_factory=Model)
    """Overrides the section `model`."""


class TeacherForcedModel(SupervisedModel):
    """Latent steps whose inputs are given in training: one parallel pass, no chain."""

    stage: Literal["teacher_forced"] = "teacher_forced"
    """Teacher-forced latent steps."""
    method: Literal["colar", "latent_sft", "csft"] = "colar"
    """What the given inputs are, and what is learned of them."""
    model: Model = Field(default_factory=Model)
    """Overrides the section `model`."""


class Gate(Section):
    """HRPO's gate, which blends what a thinking token reads."""

    top_k: Count = 50
    """Likeliest tokens that are drawn from and mixed; 0: all."""
    keep: Annotated[tuple[Share, Share], Field(strict=False)] = (0.99, 0.999)
    """Bounds between which `kept^(1 / r)` of each feature begins: the share kept of a token's
    embedding begins as its square root."""
    learning_rate: Positive | None = None
    """Peak learning rate of the gate's two layers, which then have no weight decay; null: that of
    all other weights."""
    decay_learning_rate: Positive | None = None
    """The same for the gate's decay."""

    @model_validator(mode="after")
    def _in_order(self) -> Gate:
        if not 0 < self.keep[0] <= self.keep[1] < 1:
            raise ValueError(
                f"keep: {list(self.keep)} are no two shares in order, above 0, below 1"
            )
        return self


class RivalPolicyModel(PolicyModel):
    """GRPO over a policy whose randomness is that of its latent steps."""

    stage: Literal["policy"] = "policy"
    """RL of another policy."""
    method: Literal["hrpo", "colar", "mts"] = "hrpo"
    """The policy."""
    gate: Annotated[Gate, only_when("method", "hrpo")] = Field(default_factory=Gate)
    """HRPO's gate."""


class DecodeModel(Section):
    """Another way to decode a model that is there; its weights are those of the model."""

    stage: Literal["decode"] = "decode"
    """No training."""
    start: str = Field(..., alias="from")
    """The model that is decoded."""
    method: Literal["soft_thinking", "latentseek", "colar"] = "soft_thinking"
    """How."""
    forced_steps: Annotated[Count | None, science_for("evaluation")] = None
    """Evaluate with this number of latent steps; null: adaptive."""
