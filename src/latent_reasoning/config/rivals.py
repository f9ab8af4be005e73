"""Entries of `models` that train or decode by another published method (docs/rivals.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latent_reasoning.config.fields import (
    IMPORTANT,
    Count,
    NonNegative,
    Number,
    PositiveInt,
    Section,
    Share,
    only_when,
    science_for,
)
from latent_reasoning.config.models import Model, SupervisedModel
from latent_reasoning.config.policies import PolicyModel

FOR_COLAR = only_when("method", "colar")


class CurriculumModel(SupervisedModel):
    """Supervised training whose sequences change by stages: steps leave the text one by one."""

    stage: Literal["curriculum"] = "curriculum"
    """A curriculum."""
    method: Literal["coconut", "pause", "no_thought", "icot"] = "coconut"
    """What takes the place of the text that is removed."""
    model: Model = Field(default_factory=Model)
    """Overrides the section `model`."""


class Colar(Section):
    """CoLaR: latent steps that each stand for several words of the reasoning."""

    speeds: Annotated[list[PositiveInt], IMPORTANT] = Field([1, 2, 3, 4, 5], min_length=1)
    """Words that a latent step stands for; each training step draws one of these for its batch."""
    speed: Annotated[PositiveInt | str, IMPORTANT] = 5
    """The speed in the prompts of validation and evaluation: a number, or `auto`."""
    speed_text: str = " (Thinking speed: {speed})"
    """The text after each question, with the speed in the place of {speed}."""
    auto_share: Share = 0.0
    """Share of the training steps whose prompts say `auto` instead of the speed."""
    pooling: Literal["sqrt_mean", "mean"] = "sqrt_mean"
    """What the sum of a group's embeddings is divided by: the root of their number, or it."""
    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy of words, stop decisions and the answer."""
    latent_loss: Literal["mse", "nll"] = "mse"
    """The loss of latent inputs: squared error of a sample, or negative log density."""
    latent_weight: NonNegative = 1.0
    """Its weight."""
    entropy_weight: Number = 0.0
    """Weight of the entropy of latent inputs; a negative one keeps them spread."""
    second_weight: NonNegative = 0.0
    """Weight of the cross-entropy after sampled latent inputs, in a second pass."""
    stop_label_smoothing: Share = 0.0
    """Probability mass moved from each stop label to the other decision."""

    @model_validator(mode="after")
    def _place_for_the_speed(self) -> Colar:
        if "{speed}" not in self.speed_text:
            raise ValueError(f"speed_text: {self.speed_text!r} has no {{speed}} in it")
        return self


class TeacherForcedModel(SupervisedModel):
    """Latent steps whose inputs are given in training: one parallel pass, no chain."""

    stage: Literal["teacher_forced"] = "teacher_forced"
    """Teacher-forced latent steps."""
    method: Literal["colar", "latent_sft", "csft"] = "colar"
    """What the given inputs are, and what is learned of them."""
    colar: Annotated[Colar, FOR_COLAR] = Field(default_factory=Colar)
    """Method `colar`."""
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
    speed: Annotated[PositiveInt | str | None, FOR_COLAR] = None
    """CoLaR: the speed in the prompt, about the number of words that a latent step stands for, or
    `auto`; null: that of the model."""
    latent_noise: Annotated[NonNegative, FOR_COLAR] = 0.0
    """CoLaR: latent steps are sampled, with this factor on their std; 0: they are the mean."""
    noise_seed: Annotated[Count, FOR_COLAR] = 0
    """CoLaR: seed of these samples."""
    forced_steps: Annotated[Count | None, science_for("evaluation")] = None
    """Evaluate with this number of latent steps; null: adaptive."""

    @model_validator(mode="after")
    def _mean_where_forced(self) -> DecodeModel:
        if self.latent_noise and self.forced_steps is not None:
            raise ValueError("latent_noise: sampled latents and forced_steps do not go together")
        return self
