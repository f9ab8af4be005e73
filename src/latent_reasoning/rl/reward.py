"""The relative-length reward of adaptive RL (docs/method.md, section 5; conformance note 18).

A badly formatted sample earns -1, a wrong one 0, a correct one 1 plus a length term

    coefficient * (length - mean) / (max - min)

where mean, max and min are taken over the correct samples of the same prompt, and the term is 0
where they all have one length. The coefficient is `-penalty` where the prompt is solved (its share
or count of correct samples meets `accuracy_requirement`), so that solved prompts are pushed
shorter, and `+bonus` elsewhere, so that unsolved ones are given more steps to think.

Everything here is a pure function of verdicts and lengths; texts are judged by `judge`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_reasoning.config import Reward
from latent_reasoning.data.answers import (
    ANSWER_PREFIX,
    CONTINUE,
    START,
    STOP,
    answers_match,
    is_well_formatted,
    parse_number,
)
from latent_reasoning.data.rows import DataError

BAD_FORMAT_REWARD = -1.0
CORRECT_REWARD = 1.0


@dataclass(frozen=True)
class Verdict:
    """What the reward reads of one sample."""

    well_formatted: bool
    correct: bool
    """False where the format is bad, whatever the number."""
    length: int
    """START, CONTINUE and STOP tokens of prompt and completion: n + 2 for n latent steps."""


def judge(prompt: str, completion: str, label: str) -> Verdict:
    """Judge one completion, decoded with its special tokens.

    `prompt` counts with the latent tokens it holds (it ends in START), and latent tokens inside
    the answer count too, as in the public code.
    """
    well_formatted = is_well_formatted(completion)
    return Verdict(
        well_formatted=well_formatted,
        correct=well_formatted and answer_is_right(completion, label),
        length=latent_tokens(prompt) + latent_tokens(completion),
    )


def answer_is_right(completion: str, label: str) -> bool:
    """Whether the text after the one ` The answer is:` holds the label's number first.

    Wrong where the prefix occurs not at all or more than once, whatever stands before it.
    """
    parts = completion.split(ANSWER_PREFIX)
    return len(parts) == 2 and answers_match(label, parts[1])


def label_number(label: str, where: str) -> float:
    """The number of a label; `DataError` naming the row where it holds none.

    The answer filter keeps `nan`, which nothing can ever equal: such a row is refused when the
    prompts are read, before any of it is trained on.
    """
    number = parse_number(label)
    if number is None:
        raise DataError(f"{where}: the answer {label!r} holds no number to compare with")
    return number


def latent_tokens(text: str) -> int:
    """Number of START, CONTINUE and STOP tokens in a text."""
    return sum(text.count(token) for token in (START, CONTINUE, STOP))


@dataclass(frozen=True)
class Verdicts:
    """Verdicts as tensors of one shape: bool, bool and whole numbers."""

    well_formatted: Tensor
    correct: Tensor
    length: Tensor

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Verdicts:
        """A row of verdicts, (N,)."""
        return cls(
            torch.tensor([verdict.well_formatted for verdict in verdicts], dtype=torch.bool),
            torch.tensor([verdict.correct for verdict in verdicts], dtype=torch.bool),
            torch.tensor([verdict.length for verdict in verdicts], dtype=torch.long),
        )

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors, in order."""
        return self.well_formatted, self.correct, self.length

    def __getitem__(self, index: Tensor) -> Verdicts:
        return Verdicts(self.well_formatted[index], self.correct[index], self.length[index])


def length_coefficient(correct: Tensor, samples: int, reward: Reward) -> Tensor:
    """Coefficients of the length term for groups of `samples`, of which `correct` are correct.

    `accuracy_requirement` is a share where it is at most 1, a count above; null always gives the
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


def rewards(groups: Sequence[Hashable], verdicts: Verdicts, settings: Reward) -> Tensor:
    """Rewards, float64 (N, ..): rows of `verdicts` with equal `groups` entries form one group.

    `verdicts` are (N, ..), each further index with groups of its own. Rows of a group may stand
    anywhere: a prompt that occurs twice in a batch pools its samples, as in the public code.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    by_size: dict[int, list[list[int]]] = {}
    for indices in members.values():
        by_size.setdefault(len(indices), []).append(indices)
    out = torch.zeros(verdicts.length.shape, dtype=torch.float64)
    for rows in by_size.values():
        index = torch.tensor(rows)
        out[index] = _group_rewards(verdicts[index], settings)
    return out


def _group_rewards(verdicts: Verdicts, settings: Reward) -> Tensor:
    """Rewards of groups: verdicts and rewards are (groups, samples, ..)."""
    correct, length = verdicts.correct, verdicts.length
    count = correct.sum(1, keepdim=True)
    coefficient = length_coefficient(count, correct.shape[1], settings)
    mean = (length * correct).sum(1, keepdim=True).double() / count.clamp(min=1)
    longest = length.where(correct, torch.tensor(-1)).amax(1, keepdim=True)
    shortest = length.where(correct, longest).amin(1, keepdim=True)
    # Where all correct samples have one length, the numerator is 0.
    term = (length - mean) / (longest - shortest).clamp(min=1)
    of_correct = CORRECT_REWARD + coefficient * term
    of_formatted = of_correct.where(correct, torch.zeros_like(term))
    return of_formatted.where(verdicts.well_formatted, torch.full_like(term, BAD_FORMAT_REWARD))
