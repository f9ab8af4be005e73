"""Entries of `models` that train or decode by another published method (docs/rivals.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from latent_reasoning.config.fields import (
    Count,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    Share,
    only_when,
    science_for,
)
from latent_reasoning.config.models import Model, SupervisedModel
from latent_reasoning.config.policies import PolicyModel

FOR_MIXTURES = only_when("method", "latent_sft", "csft")
FOR_LATENT_SFT = only_when("method", "latent_sft")
FOR_CSFT = only_when("method", "csft")
FOR_MTS = only_when("method", "mts")
FOR_SOFT_THINKING = only_when("method", "soft_thinking")


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
    kl_weight: Annotated[NonNegative, FOR_MIXTURES] = 1.0
    """Mixtures: weight of the divergence of the next word from each latent step's mixture."""
    rate: Annotated[PositiveInt, FOR_LATENT_SFT] = 2
    """Latent-SFT: tokens of the chain of thought that a latent step stands for."""
    gumbel_scale: Annotated[NonNegative, FOR_LATENT_SFT] = 0.0
    """Latent-SFT: Gumbel noise on the logarithm of the mixtures, drawn anew each time that a row is
    read (the public scripts: 1); 0: none."""
    gumbel_temperature: Annotated[Positive, FOR_LATENT_SFT] = 1.0
    """Latent-SFT: temperature of the noisy mixtures."""
    teacher: Annotated[str | None, FOR_CSFT] = None
    """CSFT: the `sft` model of form cot whose samples are the targets; null: the data's steps."""
    traces: Annotated[PositiveInt, FOR_CSFT] = 4
    """CSFT: samples of the teacher for each row."""
    trace_temperature: Annotated[Positive, FOR_CSFT] = 1.0
    """CSFT: sampling temperature of the teacher."""
    steps: Annotated[PositiveInt | None, FOR_CSFT] = None
    """CSFT: latent steps of every row; null: tokens of the longest trace."""
    inputs: Annotated[Literal["given", "own"], FOR_CSFT] = "given"
    """CSFT: in training a latent step reads its target mixture (one parallel pass), or the model's
    `own` (gradients flow through the chain)."""


class RivalPolicyModel(PolicyModel):
    """GRPO over a policy whose randomness is that of its latent steps."""

    stage: Literal["policy"] = "policy"
    """RL of another policy."""
    method: Literal["hrpo", "colar", "mts"] = "hrpo"
    """The policy."""
    words: Annotated[PositiveInt, FOR_MTS] = 3
    """MTS: K, the sampled words whose mean embedding is a latent step's input."""
    ratio: Annotated[Literal["divided_logits", "root"], FOR_MTS] = "divided_logits"
    """MTS: how K words make one ratio: logits divided by K in sampling and scoring (the public
    code's default), or the K-th root of the product of their ratios (the paper)."""


class SoftThinkingSettings(Section):
    """Soft Thinking; the defaults are those of the public code's README for QwQ-32B."""

    temperature: Positive = 0.6
    """Divides the logits."""
    size: PositiveInt = 10
    """Words in a mixture."""
    top_k: PositiveInt | None = 30
    """Only this many words are kept; null: all."""
    top_p: Share = 0.95
    """Of those, the likeliest words with this probability together are kept."""
    min_p: Share = 0.001
    """Of those, words with at least this share of the likeliest one's probability are kept."""
    sure_below: NonNegative = 0.01
    """The model is sure of a word at an entropy below this, in nats; 0: never."""
    patience: PositiveInt = 256
    """After this many sure words one after the other it stops to think."""


class DecodeModel(Section):
    """Another way to decode a model that is there; its weights are those of the model."""

    stage: Literal["decode"] = "decode"
    """No training."""
    start: str = Field(..., alias="from")
    """The model that is decoded."""
    method: Literal["soft_thinking", "latentseek", "colar"] = "soft_thinking"
    """How."""
    soft_thinking: Annotated[SoftThinkingSettings, FOR_SOFT_THINKING] = Field(
        default_factory=SoftThinkingSettings
    )
    """Soft Thinking's mixtures, and when it stops to think."""
    forced_steps: Annotated[Count | None, science_for("evaluation")] = None
    """Evaluate with this number of latent steps; null: adaptive."""
