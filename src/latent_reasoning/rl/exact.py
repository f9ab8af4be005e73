"""The exact estimator: GRPO's gradient averaged over stop lengths (docs/method.md, section 5).

Given the question, all samples of a prompt lie on one trajectory, so the distribution over stop
lengths is known as soon as the trajectory is: `p(n) = stop(n) * continue(n-1) * .. * continue(0)`.
The sampled estimator draws one length for each of the G samples of a group. This one keeps
everything else that is random in a group and averages over the lengths:

1. Each sample has its own uniform numbers for the answer, as in the sampled estimator. Its answer
   is decoded at *every* length that it might have stopped at: (length, answer) pairs that agree are
   one completion, and share their rows while they are decoded.
2. What a group of G such samples earns depends on all their lengths (reward and advantages are
   relative to the group), so the average is one over groups. It needs no model: `GROUPS` groups are
   drawn from p, judged and turned into advantages by arithmetic alone. Each sample's lengths are
   stratified over these groups: length n occurs in `GROUPS * p(n)` of them, rounded up or down.
3. A completion's weight in the loss is the number of times it occurs in those groups, its advantage
   the mean over these times. The gradient of the loss is then the mean of the sampled estimator's
   gradients over the groups: `sum_n p(n) A(n) grad log p(n)` for the stop decisions, and the same
   average for the tokens of the answers.

Each of the groups is distributed as a sampled one, whatever their number: the mean of the sampled
gradient *is* the mean of this one. (As in any mean of `bnpo`, up to the number of tokens that a
step is divided by, which is random in the sampled estimator and nearly constant here.) What is
averaged away is the noise of stop decisions; the questions and the answers are sampled in both.

P prompts, G samples a group, T new tokens at most, L lengths that occur.
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
"""Groups that the average over stop lengths runs over. With 64 what their choice adds to the
gradient's variance is less than a hundredth of the sampled estimator's (docs/log.md)."""


def draw_stratified(prompts: int, group_size: int, seed: int, groups: int = GROUPS) -> Tensor:
    """Uniform numbers in [0, 1), float64 (P, `groups`, G): one stop length each.

    Those of one sample lie one in each of `groups` equal parts of [0, 1), in random order (a Latin
    hypercube), while the samples of one group are independent.
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

    `uniforms` (P, G, T) are those of `rollouts.sample`, here of the answers alone; `stop_draws`
    (P, groups, G) those of `draw_stratified`. The rollout's samples are those of all groups, group
    by group. The trajectory carries its graph where gradients are enabled.
    """
    uniforms, stop_draws = uniforms.to(model.device), stop_draws.to(model.device)
    trajectory = Trajectory.begin(model, prompts)
    steps = _stop_lengths(model, trajectory, stop_draws, settings)
    with torch.no_grad():
        table = _answers_at_lengths(model, trajectory, prompts, steps, uniforms, settings)
    members = table.sample_completion.view(*uniforms.shape[:2], -1)
    # (P, G, L) at (P, G, groups): which completion each sample of each group is.
    chosen = members.gather(2, steps.cpu().transpose(1, 2)).transpose(1, 2)
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

    With 1 before and 0 after it, the differences are the distribution of the stop length n = 0..N.
    N is where STOP is forced or the tokens end, or the first length that every prompt survives with
    a probability of at most `negligible`. Extends the trajectory to there.
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
    the draw."""
    survival = survival_probabilities(model, trajectory, settings, stop_draws.min().item())
    return (stop_draws[..., None] < survival[:, None, None]).sum(-1)


def _answers_at_lengths(
    model: LatentReasoner,
    trajectory: Trajectory,
    prompts: Sequence[list[int]],
    steps: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
) -> Rollout:
    """What each sample answers at each length that it has in some group: samples (P, G x L).

    A length that it has in none is replaced by one that it has, which costs nothing.
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
    return collect(prompts, ids.cpu(), token_counts.cpu())
