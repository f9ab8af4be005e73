"""Numbers as the public code reads them (`data.number_rule: public`; docs/method.md, section 5).

It takes a text without its commas for a number if `float` does, and the first digits of any text
for its number: the label of `2.0107e-06` is 2.0107 and that of `-$5` is 5. The recorded vectors pin
this (notes 3 and 18), and `config/paper.yaml` keeps it; anywhere else `data/numbers.py` reads.
"""

from __future__ import annotations

import re

TOLERANCE = 1e-6
"""Two answers closer than this are equal."""

_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)")


def read_number(text: str) -> float | None:
    """The value of a text that passes the filter of training rows: `float` reads it without commas.

    None for other texts and those that hold `inf`; `nan`, `1e3`, `1_000` and ` 7 ` are numbers.
    """
    text = text.replace(",", "")
    try:
        value = float(text)
    except ValueError:
        return None
    return None if "inf" in text else value


def first_number(text: str) -> tuple[str, float] | None:
    """The first number of a text without its commas, as it is written and as a value."""
    match = _NUMBER.search(text.replace(",", ""))
    return None if match is None else (match.group(), float(match.group()))


def equal(label: float, given: float) -> bool:
    """Whether two numbers are closer than `TOLERANCE`; beyond `float`'s range all are equal."""
    return label == given or abs(label - given) < TOLERANCE
