"""Entries of `models` that train or decode by another published method (docs/rivals.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from latent_reasoning.config.fields import Count, Section, science_for
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


class RivalPolicyModel(PolicyModel):
    """GRPO over a policy whose randomness is that of its latent steps."""

    stage: Literal["policy"] = "policy"
    """RL of another policy."""
    method: Literal["hrpo", "colar", "mts"] = "hrpo"
    """The policy."""


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
