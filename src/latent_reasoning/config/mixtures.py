"""Settings of the methods that reason in mixtures of words (docs/rivals.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from latent_reasoning.config.fields import (
    IMPORTANT,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    Share,
)


class MixtureTargets(Section):
    """Latent-SFT's second stage: mixtures of the words that each latent step stands for."""

    rate: Annotated[PositiveInt, IMPORTANT] = 2
    """Tokens of the chain of thought that a latent step stands for."""
    targets: Annotated[Literal["counts", "encoder"], IMPORTANT] = "counts"
    """The mixture of a latent step: how often each word occurs among its tokens, or what an encoder
    makes of them that is trained first (the paper)."""
    encoder_steps: PositiveInt = 600
    """Optimiser steps of each of the encoder's three runs, with the settings of `training`."""
    kl_weight: NonNegative = 1.0
    """Weight of the divergence of the next word from each latent step's mixture."""
    gumbel_scale: NonNegative = 0.0
    """Gumbel noise on the logarithm of the mixtures, drawn anew each time that a row is read (the
    public scripts: 1); 0: none."""
    gumbel_temperature: Positive = 1.0
    """Temperature of the noisy mixtures."""

    @property
    def first_stage_steps(self) -> int:
        """Optimiser steps of the encoder's three runs; 0 without an encoder."""
        return 3 * self.encoder_steps if self.targets == "encoder" else 0


class Csft(Section):
    """CoT2's continuous supervised fine-tuning: mixtures of several chains of thought."""

    teacher: Annotated[str | None, IMPORTANT] = None
    """The `sft` model of form cot whose samples are the targets; null: the data's steps."""
    traces: PositiveInt = 4
    """Samples of the teacher for each row."""
    trace_temperature: Positive = 1.0
    """Sampling temperature of the teacher."""
    steps: Annotated[PositiveInt | None, IMPORTANT] = None
    """Latent steps of every row; null: tokens of the longest trace."""
    kl_weight: NonNegative = 1.0
    """Weight of the divergence of the next word from each latent step's mixture."""
    inputs: Literal["given", "own"] = "given"
    """In training a latent step reads its target mixture (one parallel pass), or the model's own
    (gradients flow through the chain)."""


class Mts(Section):
    """CoT2's policy: a latent step is the mean of a few sampled words."""

    words: Annotated[PositiveInt, IMPORTANT] = 3
    """K, the number of these words."""
    ratio: Literal["divided_logits", "root"] = "divided_logits"
    """How K words make one ratio: logits divided by K in sampling and scoring (the public code's
    default), or the K-th root of the product of their ratios (the paper)."""


class SoftThinking(Section):
    """Soft Thinking; the defaults are those of the public code's README for QwQ-32B."""

    temperature: Positive = 0.6
    """Divides the logits."""
    size: Annotated[PositiveInt, IMPORTANT] = 10
    """Words in a mixture."""
    top_k: PositiveInt | None = 30
    """Only this many words are kept; null: all."""
    top_p: Share = 0.95
    """Of those, the likeliest words with this probability together are kept."""
    min_p: Share = 0.001
    """Of those, words with at least this share of the likeliest one's probability are kept."""
    sure_below: Annotated[NonNegative, IMPORTANT] = 0.01
    """The model is sure of a word at an entropy below this, in nats; 0: never."""
    patience: Annotated[PositiveInt, IMPORTANT] = 256
    """After this many sure words one after the other it stops to think."""
