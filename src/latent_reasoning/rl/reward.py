"""The relative-length reward of adaptive RL (docs/method.md, section 5; conformance note 18).

Each distinct completion is judged once; each sample is rewarded:

A badly formatted sample earns -1, a wrong one 0, a correct one 1 plus a length term

    coefficient * (length - mean) / (max - min)

where mean, max and min are taken over the correct samples of the same prompt, and the term is 0
where all of these have the same length. The coefficient is `-penalty` where the prompt is solved
(its share or count of correct samples meets `accuracy_requirement`), so that solved prompts become
shorter, and `+bonus` elsewhere, so that unsolved prompts get more steps to think.

All prompts of an optimiser step are rewarded together, because a question that occurs twice in it
pools its samples. Rewards are pure functions of outcomes; texts are judged by `judge_sample`.

P prompts, G samples per group, U distinct completions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import NumberRule, Reward
from latent_reasoning.data.answers import (
    ANSWER_PREFIX,
    CONTINUE,
    START,
    STOP,
    answers_match,
    in_our_words,
    is_well_formatted,
)
from latent_reasoning.data.context import decode
from latent_reasoning.rl.grpo import advantages
from latent_reasoning.rl.prompts import RlPrompt
from latent_reasoning.rl.rollouts import Rollout

BAD_FORMAT_REWARD = -1.0
CORRECT_REWARD = 1.0


class Outcome(NamedTuple):
    """What the reward reads of one sample."""

    well_formatted: bool
    correct: bool
    """False where the format is bad, whatever the answer."""
    length: int
    """START, CONTINUE and STOP tokens of prompt and completion: n + 2 for n latent steps."""


def judge_sample(prompt: str, completion: str, label: str, rule: NumberRule = "exact") -> Outcome:
    """Judge one completion, decoded with its special tokens.

    The length includes the latent tokens of `prompt`, which ends in START, and those within the
    answer, as in the public code.
    """
    well_formatted = is_well_formatted(completion)
    return Outcome(
        well_formatted=well_formatted,
        correct=well_formatted and answer_is_right(completion, label, rule),
        length=latent_tokens(prompt) + latent_tokens(completion),
    )


def answer_is_right(completion: str, label: str, rule: NumberRule = "exact") -> bool:
    """Whether the first number after the only ` The answer is:` is the label's.

    False where the prefix does not occur or occurs more than once; what precedes it is not checked.
    """
    parts = completion.split(ANSWER_PREFIX)
    return len(parts) == 2 and answers_match(label, parts[1], rule)


def latent_tokens(text: str) -> int:
    """Number of START, CONTINUE and STOP tokens in a text."""
    return sum(text.count(token) for token in (START, CONTINUE, STOP))


def judge_completions(
    rollout: Rollout,
    prompts: Sequence[RlPrompt],
    tokenizer: PreTrainedTokenizerBase,
    announcement: str | None = None,
) -> list[Outcome]:
    """The outcome of each distinct completion; `prompts` are the rollout's, in the same order.

    `announcement` is what the model writes for ` The answer is:` (None: that).
    """
    eos_id = tokenizer.eos_token_id
    texts = [
        in_our_words(
            decode(tokenizer, [token for token in completion.ids if token != eos_id]), announcement
        )
        for completion in rollout.completions
    ]
    answered = [prompts[completion.prompt] for completion in rollout.completions]
    return [
        judge_sample(prompt.text, text, prompt.label, prompt.number_rule)
        for prompt, text in zip(answered, texts, strict=True)
    ]


class Outcomes(NamedTuple):
    """Outcomes as three tensors of one shape: bool, bool, int64."""

    well_formatted: Tensor
    correct: Tensor
    length: Tensor

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Outcomes:
        """The outcomes as tensors (N,)."""
        return cls(*(torch.tensor(values) for values in zip(*outcomes, strict=True)))

    def at(self, index: Tensor) -> Outcomes:
        """The outcomes at `index` of the first dimension."""
        return Outcomes(*(values[index] for values in self))


def length_coefficient(correct: Tensor, samples: int, reward: Reward) -> Tensor:
    """Coefficients of the length term for groups of `samples`, of which `correct` are correct.

    An `accuracy_requirement` of at most 1 is a share, a greater one a count; null always gives the
    penalty. A null bonus gives no length term below the requirement.
    """
    requirement = reward.accuracy_requirement
    if requirement is None:
        solved = torch.ones_like(correct, dtype=torch.bool)
    elif requirement <= 1:
        solved = correct.double() / samples >= requirement
    else:
        solved = correct >= requirement
    bonus = 0.0 if reward.bonus is None else reward.bonus
    coefficients = torch.full(correct.shape, bonus, dtype=torch.float64)
    return coefficients.masked_fill(solved, -reward.penalty)


def rewards(groups: Sequence[Hashable], outcomes: Outcomes, settings: Reward) -> Tensor:
    """Rewards, float64 (N, ..): rows of `outcomes` with equal `groups` entries form one group.

    `outcomes` are (N, ..), with separate groups for each index of the further dimensions. The rows
    of a group may be anywhere: a prompt that occurs twice pools its samples, as in the public code.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    by_size: dict[int, list[list[int]]] = {}
    for indices in members.values():
        by_size.setdefault(len(indices), []).append(indices)
    out = torch.zeros(outcomes.length.shape, dtype=torch.float64)
    for rows in by_size.values():
        index = torch.tensor(rows)
        out[index] = _group_rewards(outcomes.at(index), settings)
    return out


def _group_rewards(outcomes: Outcomes, settings: Reward) -> Tensor:
    """Rewards of whole groups; outcomes and rewards are (groups, samples, ..)."""
    correct, length = outcomes.correct, outcomes.length
    count = correct.sum(1, keepdim=True)
    coefficient = length_coefficient(count, correct.shape[1], settings)
    mean = (length * correct).sum(1, keepdim=True).double() / count.clamp(min=1)
    longest = length.where(correct, torch.tensor(-1)).amax(1, keepdim=True)
    shortest = length.where(correct, longest).amin(1, keepdim=True)
    # Where all correct samples have one length, the numerator is 0.
    term = (length - mean) / (longest - shortest).clamp(min=1)
    of_correct = CORRECT_REWARD + coefficient * term
    of_formatted = of_correct.where(correct, torch.zeros_like(term))
    return of_formatted.where(outcomes.well_formatted, torch.full_like(term, BAD_FORMAT_REWARD))


def reward_groups(
    rollouts: Sequence[Rollout],
    outcomes: Sequence[Sequence[Outcome]],
    questions: Sequence[str],
    settings: Reward,
) -> tuple[list[Tensor], dict[str, float]]:
    """Advantages of each rollout's completions, (U,) each, and the means over the step.

    `outcomes` come from `judge_completions`; `questions` holds the question of each prompt of all
    rollouts, in order.
    """
    samples = _of_samples(rollouts, outcomes)
    prompts, groups, group_size = samples.length.shape
    # A question that occurs twice pools its samples: first groups with first ones, and so on.
    rows = [question for question in questions for _ in range(group_size)]
    by_row = Outcomes(*(values.transpose(1, 2).flatten(0, 1) for values in samples))
    values = rewards(rows, by_row, settings).view(prompts, group_size, groups).transpose(1, 2)
    per_sample = advantages(values.flatten(), group_size).view(prompts, -1)
    parts = per_sample.split([len(rollout.prompts) for rollout in rollouts])
    return (
        [_of_completions(r, part) for r, part in zip(rollouts, parts, strict=True)],
        _means(values, samples) | _completion_means(rollouts),
    )


def _of_samples(rollouts: Sequence[Rollout], outcomes: Sequence[Sequence[Outcome]]) -> Outcomes:
    """The outcome of each sample of all prompts: (P, groups, G)."""
    parts = [
        Outcomes.of(own).at(rollout.sample_completion.unflatten(1, (rollout.groups, -1)))
        for rollout, own in zip(rollouts, outcomes, strict=True)
    ]
    return Outcomes(*map(torch.cat, zip(*parts, strict=True)))


def _of_completions(rollout: Rollout, per_sample: Tensor) -> Tensor:
    """(P, groups x G) -> (U,): the mean over a completion's samples, which are equal in a group."""
    index, per_sample = rollout.sample_completion.flatten(), per_sample.flatten()
    zeros = per_sample.new_zeros(len(rollout.completions))
    least = zeros.scatter_reduce(0, index, per_sample, "amin", include_self=False)
    # Deviations from the least are averaged: the mean of equal numbers is bitwise that number.
    return least.index_add(0, index, (per_sample - least[index]) / rollout.weights[index])


def _means(rewards: Tensor, samples: Outcomes) -> dict[str, float]:
    """The logged means over a step's samples, (P, groups, G)."""
    count = rewards.numel()
    return {
        "reward": rewards.flatten().mean().item(),
        "reasoning_tokens": samples.length.sum().item() / count,
        "rollout_accuracy": samples.correct.flatten().float().mean().item(),
        "badly_formatted_share": (~samples.well_formatted).sum().item() / count,
        "all_correct_share": samples.correct.all(-1).flatten().float().mean().item(),
    }


def _completion_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The number of distinct completions, which had to be scored, per sample of a group."""
    samples = sum(rollout.sample_completion.numel() / rollout.groups for rollout in rollouts)
    return {"distinct_share": sum(len(rollout.completions) for rollout in rollouts) / samples}
