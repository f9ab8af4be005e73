"""Numbers that words of a question imply: `twice` 2, `week` 7 and 52, `%` 100.

A perturbed copy of a row (`data.perturbation`) does not change them.
"""

from __future__ import annotations

import re
from functools import cache

_WORD = re.compile(r"[a-z]+|%|\$")
_ALWAYS_IMPLIED = frozenset({0, 1})
_IMPLYING_WORDS = {
    2: "two twice double doubled doubles half halves halved couple pair pairs both twin twins "
    "other weekend minute minutes",
    3: "three third thirds triple tripled triples thrice yard",
    4: "four quarter quarters fourth fourths quadruple gallon quarterly week weeks weekly month "
    "months monthly",
    5: "five fifth fifths weekday weekdays nickel nickels",
    6: "six sixth sixths",
    7: "seven day days daily week weeks weekly",
    8: "eight eighth eighths",
    9: "nine",
    10: "ten tenth tenths decade decades dime dimes",
    11: "eleven",
    12: "twelve dozen dozens foot feet inch inches month months monthly year years yearly annual "
    "annually",
    13: "thirteen",
    14: "fourteen",
    15: "fifteen",
    16: "sixteen pound pounds ounce ounces",
    17: "seventeen",
    18: "eighteen",
    19: "nineteen",
    20: "twenty",
    24: "day days daily hour hours hourly",
    30: "thirty day days daily month months monthly",
    40: "forty",
    50: "fifty",
    52: "week weeks weekly year years yearly annual annually",
    60: "sixty hour hours hourly minute minutes second seconds",
    70: "seventy",
    80: "eighty",
    90: "ninety",
    100: "hundred % percent percentage $ cent cents dollar dollars century meter meters cm",
    365: "day days daily year years yearly annual annually",
    1000: "thousand meter meters km kilometer kilometers gram grams kg kilogram kilograms liter "
    "liters ml",
    1000000: "million",
}


def implied_constants(question: str) -> frozenset[int]:
    """Constants that words and signs of the question may stand for in its steps."""
    constants = _constants_by_word()
    words = _WORD.findall(question.lower())
    return _ALWAYS_IMPLIED.union(*(constants.get(word, ()) for word in words))


@cache
def _constants_by_word() -> dict[str, set[int]]:
    constants: dict[str, set[int]] = {}
    for constant, words in _IMPLYING_WORDS.items():
        for word in words.split():
            constants.setdefault(word, set()).add(constant)
    return constants
