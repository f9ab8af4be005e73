"""The exact estimator: GRPO's gradient averaged over stop lengths (docs/method.md, section 5).

Given the question, all samples of a prompt lie on one trajectory, so the distribution over stop
lengths is known as soon as the trajectory is: `p(n) = stop(n) * continue(n-1) * .. * continue(0)`.
The sampled estimator draws one length for each of the G samples of a group. This one keeps
everything else that is random in a group and averages over the lengths:

1. Each sample has its own uniform numbers for the answer, as in the sampled estimator. Its answer
   is decoded at *every* length at which it might have stopped; equal (length, answer) pairs are one
   completion, and share their rows while they are decoded.
2. The rewards of a group of G such samples depend on all their lengths (reward and advantages are
   relative to the group), so the average is over groups. It needs no model: `GROUPS` groups are
   drawn from p, judged and turned into advantages by arithmetic alone. Each sample's lengths are
   stratified over these groups: length n occurs in `GROUPS * p(n)` of them, rounded up or down.
3. A completion's weight in the loss is the number of times it occurs in those groups, its advantage
   the mean over these times. The gradient of the loss is then the mean of the sampled estimator's
   gradients over the groups: `sum_n p(n) A(n) grad log p(n)` for the stop decisions, and the same
   average for the tokens of the answers.

Each group is distributed as a sampled group, whatever their number, so the expected gradients of
the two estimators are equal. (For `bnpo` they differ through the number of tokens that a step is
divided by, which is random in the sampled estimator and nearly constant here.) The noise of stop
decisions is averaged away; the questions and the answers are sampled in both.

P prompts, G samples per group, T new tokens at most, L lengths that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rl.rollouts import (
    Rollout,
    SamplingSettings,
    collect,
    continue_probability,
    sample_answers,
)

GROUPS = 64
"""Number of groups in the average over stop lengths. With 64, their choice adds less than a
hundredth of the sampled estimator's variance to the gradient's variance (docs/log.md)."""


def draw_stratified(prompts: int, group_size: int, seed: int, groups: int = GROUPS) -> Tensor:
    """Uniform numbers in [0, 1), float64 (P, `groups`, G), each of which gives one stop length.

    Every sample has one number in each of `groups` equal parts of [0, 1), in random order (a Latin
    hypercube); the samples of a group are independent.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, groups, group_size)
    part = torch.rand(shape, generator=generator).argsort(dim=1)
    return (part + torch.rand(shape, generator=generator, dtype=torch.float64)) / groups


def sample_all_lengths(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    uniforms: Tensor,
    stop_draws: Tensor,
    settings: SamplingSettings,
) -> tuple[Rollout, Trajectory]:
    """Groups of G samples for each of P prompts, their stop lengths from `stop_draws`.

    `uniforms` (P, G, T) are those of `rollouts.sample`, used for the answers only; `stop_draws` (P,
    groups, G) come from `draw_stratified`. The rollout holds the samples of all groups, group by
    group. The trajectory has its graph where gradients are enabled.
    """
    trajectory = Trajectory.begin(model, prompts)
    steps = _stop_lengths(model, trajectory, stop_draws, settings)
    with torch.no_grad():
        table = _answers_at_lengths(model, trajectory, prompts, steps, uniforms, settings)
    members = table.sample_completion.view(*uniforms.shape[:2], -1)
    # (P, G, L) at (P, G, groups): which completion each sample of each group is.
    chosen = members.gather(2, steps.transpose(1, 2)).transpose(1, 2)
    counts = chosen.flatten().bincount(minlength=len(table.completions)).tolist()
    completions = [
        replace(completion, count=count)
        for completion, count in zip(table.completions, counts, strict=True)
    ]
    groups = steps.shape[1]
    return Rollout(table.prompts, completions, chosen.flatten(1), groups), trajectory


def survival_probabilities(
    model: LatentReasoner,
    trajectory: Trajectory,
    settings: SamplingSettings,
    negligible: float = 0.0,
) -> Tensor:
    """Survival: the probability of at least 1, 2, .. latent steps, float64 (P, N).

    With 1 before it and 0 after it, its differences are the distribution of the stop length n =
    0..N. N is the length where STOP is forced or the tokens end, or the first length that every
    prompt reaches with a probability of at most `negligible`. Extends the trajectory up to there.
    """
    survival: list[Tensor] = []
    for step in range(settings.max_new_tokens):
        trajectory.extend(model, step)
        if step == model.settings.max_latent_steps:
            break
        with torch.no_grad():
            continues = continue_probability(model, trajectory, step, settings)[:, 0]
        survival.append(continues * survival[-1] if survival else continues)
        if survival[-1].max() <= negligible:
            break
    return torch.stack(survival, dim=1)


def _stop_lengths(
    model: LatentReasoner, trajectory: Trajectory, stop_draws: Tensor, settings: SamplingSettings
) -> Tensor:
    """Latent steps (P, groups, G) by inverse sampling: the number of survival probabilities above
    the draw. On the host, like the draws."""
    survival = survival_probabilities(model, trajectory, settings, stop_draws.min().item()).cpu()
    return (stop_draws[..., None] < survival[:, None, None]).sum(-1)


def _answers_at_lengths(
    model: LatentReasoner,
    trajectory: Trajectory,
    prompts: Sequence[list[int]],
    steps: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
) -> Rollout:
    """The answers of each sample at each length that it has in some group: samples (P, G x L).

    A length that it has in no group is replaced by one that it has, which costs nothing.
    """
    lengths = torch.arange(int(steps.max()) + 1, device=steps.device)
    occurs = (steps[..., None] == lengths).any(1)
    grid = torch.where(occurs, lengths, steps[:, 0, :, None]).flatten(1)
    ids, token_counts = sample_answers(
        model,
        trajectory,
        grid,
        grid < settings.max_new_tokens,
        uniforms.repeat_interleave(len(lengths), dim=1),
        settings,
    )
    return collect(prompts, ids, token_counts)
