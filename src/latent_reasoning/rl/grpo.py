"""Group-relative policy optimisation: advantages, clipped ratio, KL (docs/method.md, section 5).

Pure functions of log-probabilities (conformance notes 19 and 20). A row is one *distinct*
completion, and `weights` holds the number of samples that it stands for: equal samples are scored
once, and the result is exactly that of scoring each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["bnpo", "grpo", "dr_grpo"]

STD_OFFSET = 1e-4
"""Added to a group's standard deviation. Part of the method: the rewards of an all-correct group
have a standard deviation of about 3e-5, and this keeps their advantages at about +-0.4 (0.75 for
the only short one of 16; always below 1)."""


def advantages(
    rewards: Tensor, group_size: int, *, scale: bool = True, offset: float = STD_OFFSET
) -> Tensor:
    """Rewards (N,) relative to their group: `(r - mean) / (std + offset)`, unbiased std.

    Consecutive blocks of `group_size` samples form a group; `scale=False` gives `r - mean`.
    """
    grouped = rewards.view(-1, group_size)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if scale:
        centred = centred / (grouped.std(dim=1, keepdim=True) + offset)
    return centred.view(-1)


@dataclass(frozen=True)
class PolicyLoss:
    """A weighted mean as numerator and denominator, so that micro-batches add up exactly."""

    numerator: Tensor
    """Sum to be minimised, with gradient."""
    denominator: float | Tensor
    """What the sum is divided by: tokens (bnpo), samples (grpo), samples x length (dr_grpo)."""
    kl: Tensor
    """Mean KL to the reference over these tokens (0 without a reference)."""
    clip_low: Tensor
    """Share of these tokens whose ratio is clipped below."""
    clip_high: Tensor
    """Share of these tokens whose ratio is clipped above."""

    @property
    def loss(self) -> Tensor:
        """The loss of this micro-batch alone."""
        return self.numerator / self.denominator


def kl_per_token(log_probs: Tensor, reference: Tensor) -> Tensor:
    """The estimator `exp(d) - d - 1` with d = reference - policy (note 20), elementwise."""
    difference = reference - log_probs
    return torch.exp(difference) - difference - 1


def policy_loss(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: LossType,
    epsilon: float,
    kl_weight: float,
    max_completion_length: int,
    weights: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    reference: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient loss with a KL term.

    `log_probs`, `old_log_probs`, `reference` and `mask` are (U, T): tokens of U distinct
    completions; `mask` is 1 where a token was sampled (EOS counts, what follows does not).
    `advantages` and `weights` are (U,). Without `old_log_probs` the ratio is exactly 1 and the
    gradient is that of `-advantage * log_prob`. `kind` says how tokens are averaged: over all of
    them (bnpo), within each sample first (grpo), over samples x `max_completion_length` (dr_grpo).
    `denominator` is that of `mean_over`, where the host has it already.
    """
    excluded, mask = ~mask.bool(), mask.to(log_probs.dtype)
    weights = torch.ones_like(advantages) if weights is None else weights.to(log_probs.dtype)
    weighted_mask = mask * weights[:, None]
    advantage = advantages.to(log_probs.dtype)[:, None]
    # A token outside the loss may have any log-probability; 0 keeps its ratio and KL finite.
    log_probs = log_probs.masked_fill(excluded, 0)
    old = log_probs.detach() if old_log_probs is None else old_log_probs.masked_fill(excluded, 0)
    ratio = torch.exp(log_probs - old)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    token_loss = -torch.minimum(ratio * advantage, clipped * advantage)
    kl = torch.zeros_like(log_probs)
    if reference is not None:
        kl = kl_per_token(log_probs, reference.masked_fill(excluded, 0))
        token_loss = token_loss + kl_weight * kl

    def share(values: Tensor) -> Tensor:
        # Weights are counts: the divisor is below 1 only where there is no token at all.
        return (values.detach() * weighted_mask).sum() / weighted_mask.sum().clamp(min=1)

    if denominator is None:
        denominator = mean_over(mask, weights, kind, max_completion_length)
    return PolicyLoss(
        numerator=_sum(token_loss, mask, weights, kind),
        denominator=denominator,
        kl=share(kl),
        clip_low=share((ratio < 1 - epsilon) & (advantage < 0)),
        clip_high=share((ratio > 1 + epsilon) & (advantage > 0)),
    )


def mean_over(mask: Tensor, weights: Tensor, kind: LossType, max_completion_length: int) -> float:
    """What the loss is divided by: tokens (bnpo), samples (grpo), samples x length (dr_grpo)."""
    if kind == "bnpo":
        return float((weights * mask.sum(dim=1)).sum())
    if kind in ("grpo", "dr_grpo"):
        return float(weights.sum()) * (max_completion_length if kind == "dr_grpo" else 1)
    raise ValueError(f"unknown loss {kind!r}: bnpo, grpo and dr_grpo are known")


def _sum(token_loss: Tensor, mask: Tensor, weights: Tensor, kind: LossType) -> Tensor:
    """Numerator of the mean over tokens (U, T) that `kind` names."""
    per_row = weights * (token_loss * mask).sum(dim=1)
    if kind == "grpo":
        per_row = per_row / mask.sum(dim=1).clamp(min=1)
    return per_row.sum()
