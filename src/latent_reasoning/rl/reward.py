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


def length_coefficient(correct: int, samples: int, reward: Reward) -> float:
    """Coefficient of the length term for a prompt of which `correct` of `samples` are correct.

    `accuracy_requirement` is a share where it is at most 1, a count above; null always gives the
    penalty. A null bonus gives no length term below the requirement.
    """
    requirement = reward.accuracy_requirement
    if requirement is None:
        solved = True
    elif requirement <= 1:
        solved = correct / samples >= requirement
    else:
        solved = correct >= requirement
    if solved:
        return -reward.penalty
    return 0.0 if reward.bonus is None else reward.bonus


def rewards(
    groups: Sequence[Hashable], verdicts: Sequence[Verdict], settings: Reward
) -> list[float]:
    """Reward of each sample; samples with equal `groups` entries (the prompt) form one group.

    The two sequences run in parallel, groups in any order: a prompt that occurs twice in a batch
    pools its samples, as in the public code.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    out = [0.0] * len(verdicts)
    for indices in members.values():
        group_rewards = _group_rewards([verdicts[index] for index in indices], settings)
        for index, value in zip(indices, group_rewards, strict=True):
            out[index] = value
    return out


def _group_rewards(verdicts: list[Verdict], settings: Reward) -> list[float]:
    lengths = [verdict.length for verdict in verdicts if verdict.correct]
    coefficient = length_coefficient(len(lengths), len(verdicts), settings)
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    spread = max(lengths) - min(lengths) if lengths else 0
    out = []
    for verdict in verdicts:
        if not verdict.well_formatted:
            out.append(BAD_FORMAT_REWARD)
        elif not verdict.correct:
            out.append(0.0)
        else:
            term = (verdict.length - mean) / spread if spread else 0.0
            out.append(CORRECT_REWARD + coefficient * term)
    return out
