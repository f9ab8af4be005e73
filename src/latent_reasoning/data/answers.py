"""Answers: which rows are kept, and whether a completion is right.

Four questions are kept apart, as in the public code (the notes are those at the end of
docs/method.md):

- *filter* (training rows): is the whole answer a plain number? `is_plain_number` (note 3)
- *label* (every row): which number does the answer stand for? `label_value`
- *evaluation*: the first number after the **last** ` The answer is:`, in any case (note 16).
  `judge`
- *RL*: exactly one ` The answer is:`, in this case, and only latent tokens and white space before
  it (note 18). `is_well_formatted`

What a number is, labels and completions share: the grammar of `data/numbers.py`, or with
`data.number_rule: public` that of the public code, `data/public_numbers.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from types import ModuleType
from typing import Literal

from latent_reasoning.config import NumberRule
from latent_reasoning.data import numbers, public_numbers
from latent_reasoning.data.sequences import ANSWER_PREFIX, CONTINUE, START, STOP

# ASCII: Unicode case folding would also match the long s and the dotless i.
_ANY_CASE_PREFIX = re.compile(re.escape(ANSWER_PREFIX), re.IGNORECASE | re.ASCII)
_LATENT_TOKENS = re.compile(rf"({re.escape(START)}|{re.escape(CONTINUE)}|{re.escape(STOP)}|\s)*")

Thinking = Literal["latent", "text", "forced"]


@dataclass(frozen=True)
class Verdict:
    """How a completion is scored: `extracted` is the number's text, None if there is none."""

    extracted: str | None
    well_formatted: bool
    correct: bool


def is_plain_number(answer: str, rule: NumberRule = "exact") -> bool:
    """The filter of training rows: whether the answer is a number and nothing else."""
    return _grammar(rule).read_number(answer) is not None


def is_negative(answer: str, rule: NumberRule = "exact") -> bool:
    """Whether a plain number is below zero; latent SFT drops such rows. `-0` is not below zero."""
    value = _grammar(rule).read_number(answer)
    return value is not None and value < 0


def label_value(answer: str, rule: NumberRule = "exact") -> Fraction | float | None:
    """The number that an answer stands for, None if it stands for none.

    That of a plain number, or of a text that holds a single number (`72 dollars`). The public rule
    takes the first number of any text.
    """
    if rule == "public":
        found = public_numbers.first_number(answer)
        return None if found is None else found[1]
    value = numbers.read_number(answer)
    if value is None and (only := numbers.only_number(answer)):
        value = only.value
    return value


def parse_number(answer: str, rule: NumberRule = "exact") -> float | None:
    """`label_value` as the nearest float, infinite where it is beyond float's range."""
    value = label_value(answer, rule)
    try:
        return None if value is None else float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def find_number(text: str, rule: NumberRule = "exact") -> str | None:
    """The text of the first number of a completion, commas removed: `1,200.50 dollars` gives
    `1200.50`."""
    found = _first_number(text, rule)
    return None if found is None else found[0]


def answers_match(label: str, text: str, rule: NumberRule = "exact") -> bool:
    """Whether the first number of `text` is that of the answer `label`, within the tolerance."""
    expected, found = label_value(label, rule), _first_number(text, rule)
    return None not in (expected, found) and _grammar(rule).equal(expected, found[1])


@lru_cache(2**14)
def _first_number(text: str, rule: NumberRule) -> tuple[str, Fraction | float] | None:
    """The first number of a text as written and as a value; equal texts, of which the samples of a
    prompt and the forced answers to a question have many, are read once."""
    return _grammar(rule).first_number(text)


def _grammar(rule: NumberRule) -> ModuleType:
    return public_numbers if rule == "public" else numbers


def split_completion(text: str) -> tuple[str, str] | None:
    """The text before and after the last ` The answer is:` (any case); None if there is none."""
    matches = list(_ANY_CASE_PREFIX.finditer(text))
    return (text[: matches[-1].start()], text[matches[-1].end() :]) if matches else None


def in_our_words(completion: str, announcement: str | None) -> str:
    """A completion with ` The answer is:` in the place of a model's own `announcement` (None: it is
    that), the first one."""
    return completion.replace(announcement, ANSWER_PREFIX, 1) if announcement else completion


def judge(label: str, completion: str, thinking: Thinking, rule: NumberRule = "exact") -> Verdict:
    """Score a completion as the evaluation does (docs/method.md, section 6).

    Args:
        label: the row's answer.
        completion: the text after the prompt, special tokens kept.
        thinking: `latent`, the prompt ended in START, so STOP must come before the answer;
            `text`, anything may; `forced`, the prompt ended in ` The answer is:`, so the whole
            completion is the answer.
        rule: how numbers are read, `data.number_rule`.
    """
    parts = ("", completion) if thinking == "forced" else split_completion(completion)
    if parts is None or (thinking == "latent" and STOP not in parts[0]):
        return Verdict(None, False, False)
    return Verdict(find_number(parts[1], rule), True, answers_match(label, parts[1], rule))


def is_well_formatted(completion: str) -> bool:
    """RL's format check: one ` The answer is:`, only latent tokens and white space before it.

    Order, a missing STOP and an empty answer are not checked (note 18).
    """
    before, *after = completion.split(ANSWER_PREFIX)
    return len(after) == 1 and _LATENT_TOKENS.fullmatch(before) is not None
