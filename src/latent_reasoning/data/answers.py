"""Numbers in answers: which rows are kept, and whether a completion is right.

Four questions are kept apart, as in the public code (the notes are those at the end of
docs/method.md):

- *filter* (training rows): is the whole answer a plain number? `is_plain_number` (note 3)
- *label* (every row): does the answer hold a number to compare with? `find_number`
- *evaluation*: the first number after the **last** ` The answer is:`, in any case (note 16).
  `judge`
- *RL*: exactly one ` The answer is:`, in this case, and only latent tokens before it (note 18).
  `is_well_formatted`
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from latent_reasoning.data.sequences import ANSWER_PREFIX, CONTINUE, START, STOP

TOLERANCE = 1e-6
"""Two answers closer than this are equal (docs/method.md, section 5)."""

_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)")
# ASCII: Unicode case folding would also match the long s and the dotless i.
_ANY_CASE_PREFIX = re.compile(re.escape(ANSWER_PREFIX), re.IGNORECASE | re.ASCII)
_LATENT_TOKENS = re.compile(f"({re.escape(START)}|{re.escape(CONTINUE)}|{re.escape(STOP)})*")

Thinking = Literal["latent", "text", "forced"]


@dataclass(frozen=True)
class Verdict:
    """How a completion is scored: `extracted` is the number's text, None if there is none."""

    extracted: str | None
    well_formatted: bool
    correct: bool


def is_plain_number(answer: str) -> bool:
    """The filter of training rows: `float` reads the text without its commas, and it has no `inf`.

    So `nan`, `1e3`, `1_000` and ` 7 ` are kept; `$12`, `1/2`, `50%` and the empty text are not.
    """
    text = answer.replace(",", "")
    try:
        float(text)
    except ValueError:
        return False
    return "inf" not in text


def is_negative(answer: str) -> bool:
    """Whether a plain number is below zero; latent SFT drops such rows. `-0` is not below zero."""
    return float(answer.replace(",", "")) < 0


def find_number(text: str) -> str | None:
    """The text of the first number, commas removed: `1,200.50 dollars` gives `1200.50`."""
    match = _NUMBER.search(text.replace(",", ""))
    return match.group() if match else None


def parse_number(text: str) -> float | None:
    """The first number of a text; None if it has none."""
    number = find_number(text)
    return None if number is None else float(number)


def answers_match(label: str, text: str) -> bool:
    """Whether the first number of `text` is that of `label`, within `TOLERANCE`."""
    expected, given = parse_number(label), parse_number(text)
    if expected is None or given is None:
        return False
    return expected == given or abs(expected - given) < TOLERANCE


def split_completion(text: str) -> tuple[str, str] | None:
    """The text before and after the last ` The answer is:` (any case); None if there is none."""
    matches = list(_ANY_CASE_PREFIX.finditer(text))
    return (text[: matches[-1].start()], text[matches[-1].end() :]) if matches else None


def judge(label: str, completion: str, thinking: Thinking) -> Verdict:
    """Score a completion as the evaluation does (docs/method.md, section 6).

    Args:
        label: the row's answer.
        completion: the text after the prompt, special tokens kept.
        thinking: `latent`, the prompt ended in START, so STOP must come before the answer;
            `text`, anything may; `forced`, the prompt ended in ` The answer is:`, so the whole
            completion is the answer.
    """
    if thinking == "forced":
        return Verdict(find_number(completion), True, answers_match(label, completion))
    parts = split_completion(completion)
    if parts is None or (thinking == "latent" and STOP not in parts[0]):
        return Verdict(None, False, False)
    return Verdict(find_number(parts[1]), True, answers_match(label, parts[1]))


def is_well_formatted(completion: str) -> bool:
    """RL's format check: exactly one ` The answer is:` and nothing but latent tokens before it.

    Order, a missing STOP and an empty answer are not checked (note 18).
    """
    before, *after = completion.split(ANSWER_PREFIX)
    return len(after) == 1 and _LATENT_TOKENS.fullmatch(before) is not None
