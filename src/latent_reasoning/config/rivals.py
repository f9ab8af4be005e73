"""Entries of `models` that train or decode by another published method (docs/rivals.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from latent_reasoning.config.distillation import StepDecoder
from latent_reasoning.config.fields import (
    IMPORTANT,
    Count,
    NonNegative,
    Number,
    Positive,
    PositiveInt,
    Section,
    Share,
    ShareBetween,
    only_when,
    science_for,
)
from latent_reasoning.config.mixtures import Csft, MixtureTargets, Mts, SoftThinking
from latent_reasoning.config.models import Model, SupervisedModel
from latent_reasoning.config.policies import PolicyModel

FOR_COLAR = only_when("method", "colar")


def _number_or_auto(speed: int | str) -> int | str:
    if isinstance(speed, str) and speed != "auto":
        raise ValueError(f"{speed!r} is neither a number of words nor auto")
    return speed


Speed = Annotated[PositiveInt | str, AfterValidator(_number_or_auto)]


class Removal(Section):
    """Tokens that `icot` removes from the reasoning."""

    start: Count = 0
    """Tokens removed from the first step on."""
    steps_per_token: PositiveInt = 1
    """Optimiser steps after which one token more is removed."""
    pretrain_steps: Count = 0
    """Steps in which `start` tokens are removed, before there are more."""
    all_beyond: PositiveInt | None = None
    """From this number of tokens on all are removed; null: until nothing is left."""
    side: Literal["left", "right"] = "left"
    """The first tokens are removed, or the last ones."""
    smoothing: Positive | None = 4.0
    """lambda: each row loses k tokens more with a probability that falls as exp(-lambda k); null:
    none more."""


class CurriculumModel(SupervisedModel):
    """Supervised training whose sequences change by stages: steps leave the text one by one."""

    stage: Literal["curriculum"] = "curriculum"
    """A curriculum."""
    method: Literal["coconut", "pause", "no_thought", "icot"] = "coconut"
    """What takes the place of the text that is removed."""
    model: Model = Field(default_factory=lambda: Model(recurrent_filter="none"))
    """Overrides the section `model`; only `coconut` (as published, with the filter `none`) and
    `pause` (with the filter `pause`) have latent steps."""
    latents_per_step: PositiveInt = 2
    """c: latent steps in the place of a removed step (`coconut`, `pause`)."""
    last_latent_stage: PositiveInt = 3
    """M: stage s removes the first s steps, and stage M + 1 all of them, with c M latent steps in
    every row."""
    first_stage: Count = 0
    """The stage that training begins with; at 0 all text is there."""
    steps_per_stage: PositiveInt = 100
    """Optimiser steps of a stage; the last stage has all that are left."""
    uniform_mix: Share = 0.0
    """Share of the rows that are read at a stage of their own, any up to their number of steps."""
    reset_optimizer: bool = False
    """Each stage (`icot`: each token more) begins with a new optimiser."""
    removal: Removal = Field(default_factory=Removal)
    """What `icot` removes, instead of whole steps."""
    step_decoder: StepDecoder | None = None
    """A second model that learns to write each removed step from its latent inputs (SIM-CoT, on
    `coconut`); null: none."""

    @property
    def has_latents(self) -> bool:
        """Whether it makes a latent reasoner."""
        return self.method in ("coconut", "pause")

    @property
    def forced_steps(self) -> int | None:
        """The latent steps of validation and evaluation; None for a model without any."""
        return self.last_latent_stage * self.latents_per_step if self.has_latents else None

    @model_validator(mode="after")
    def _stages_fit(self) -> CurriculumModel:
        if self.step_decoder is not None and self.method != "coconut":
            raise ValueError(
                f"step_decoder: reads the latent inputs of method coconut; {self.method} has none "
                "of the model's making"
            )
        if self.method == "pause" and self.model.recurrent_filter != "pause":
            raise ValueError(
                f"model.recurrent_filter: {self.model.recurrent_filter} is not what method: pause "
                "feeds; set it to pause"
            )
        if self.method == "icot":
            return self
        if self.first_stage > self.last_latent_stage + 1:
            raise ValueError(
                f"first_stage: {self.first_stage} is beyond the last stage, last_latent_stage + 1 "
                f"= {self.last_latent_stage + 1}"
            )
        needed = (self.last_latent_stage + 1 - self.first_stage) * self.steps_per_stage
        if self.training.steps <= needed:
            raise ValueError(
                f"training.steps: {self.training.steps} steps end before the last stage, which "
                f"begins after {needed}; raise them, or lower steps_per_stage: "
                f"{self.steps_per_stage}"
            )
        return self


class Colar(Section):
    """CoLaR: latent steps that each stand for several words of the reasoning."""

    speeds: Annotated[list[PositiveInt], IMPORTANT] = Field([1, 2, 3, 4, 5], min_length=1)
    """Words that a latent step stands for; each training step draws one of these for its batch."""
    speed: Annotated[Speed, IMPORTANT] = 5
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
        if self.speed == "auto" and not self.auto_share:
            raise ValueError("speed: auto is in no prompt of the training; raise auto_share")
        return self


class TeacherForcedModel(SupervisedModel):
    """Latent steps whose inputs are given in training: one parallel pass, no chain."""

    stage: Literal["teacher_forced"] = "teacher_forced"
    """Teacher-forced latent steps."""
    method: Literal["colar", "latent_sft", "csft"] = "colar"
    """What the given inputs are, and what is learned of them."""
    colar: Annotated[Colar, FOR_COLAR] = Field(default_factory=Colar)
    """Method `colar`."""
    latent_sft: Annotated[MixtureTargets, only_when("method", "latent_sft")] = Field(
        default_factory=MixtureTargets
    )
    """Method `latent_sft`."""
    csft: Annotated[Csft, only_when("method", "csft")] = Field(default_factory=Csft)
    """Method `csft`."""
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


class PonderNet(Section):
    """PonderNet's loss."""

    rate: ShareBetween = 0.25
    """Probability with which the geometric prior ends at each step."""
    weight: NonNegative = 0.01
    """beta: weight of the divergence from the prior."""


class RivalPolicyModel(PolicyModel):
    """GRPO over a policy whose randomness is that of its latent steps."""

    stage: Literal["policy"] = "policy"
    """RL of another policy."""
    method: Literal["hrpo", "colar", "mts", "pondernet"] = "hrpo"
    """The policy."""
    ponder: Annotated[PonderNet, only_when("method", "pondernet")] = Field(
        default_factory=PonderNet
    )
    """Method `pondernet`."""
    gate: Annotated[Gate, only_when("method", "hrpo")] = Field(default_factory=Gate)
    """HRPO's gate."""
    mts: Annotated[Mts, only_when("method", "mts")] = Field(default_factory=Mts)
    """Method `mts`."""
    reward_per_step: Annotated[bool, FOR_COLAR] = False
    """CoLaR: the reward is divided by the sample's number of latent steps."""


class Seek(Section):
    """LatentSeek: the states of the first part of an answer follow a reward at test time."""

    reward: Annotated[Literal["confidence", "verifier", "oracle"], IMPORTANT] = "confidence"
    """`confidence`: mean log-probability of the answer. `verifier`: minus the share of sampled
    chains that come to another answer. `oracle`: 0 for the right answer, else -1: it knows the
    label, and is an upper bound alone."""
    share: Annotated[Share, IMPORTANT] = 0.1
    """rho: share of the answer's tokens, the first ones, whose states are optimised."""
    learning_rate: Annotated[Positive, IMPORTANT] = 0.03
    """Learning rate of Adam."""
    steps: PositiveInt = 10
    """Most steps."""
    threshold: Number = -0.2
    """A reward above this ends the search."""
    max_grad_norm: Positive | None = None
    """Gradient clipping by the norm of an answer's states; null: none."""
    samples: PositiveInt = 8
    """Chains of `verifier`."""
    temperature: Positive = 1.0
    """Their sampling temperature."""
    seed: Count = 0
    """Seed of these chains."""


class DecodeModel(Section):
    """Another way to decode a model that is there; its weights are those of the model."""

    stage: Literal["decode"] = "decode"
    """No training."""
    start: str = Field(..., alias="from")
    """The model that is decoded."""
    method: Literal["soft_thinking", "latentseek", "colar"] = "soft_thinking"
    """How."""
    seek: Annotated[Seek, only_when("method", "latentseek")] = Field(default_factory=Seek)
    """LatentSeek's search."""
    soft_thinking: Annotated[SoftThinking, only_when("method", "soft_thinking")] = Field(
        default_factory=SoftThinking
    )
    """Method `soft_thinking`."""
    speed: Annotated[Speed | None, FOR_COLAR] = None
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
