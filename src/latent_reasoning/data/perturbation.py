"""`numeric_perturbation`: more training rows by changing the numbers of the given ones.

For a row whose steps are equations (`<<48/2=24>>`), the numbers that occur in both question and
steps are replaced by others of similar size, the chain is recomputed, and the copy is kept only if
it comes out clean. Nothing else of the text changes: no new stories, no new chains.

A number in a step has an origin: a number of the question, the result of an earlier step, or a
constant that the question's words imply (`twice` 2, `week` 7, `%` 100). Its new value is that of
its origin. If the origin is uncertain, all possible origins must give the same number; if there is
none, the row is left alone. So numbers that words imply are never changed, and neither are those in
fractions, ranges, times of day, ordinals and years.

Arithmetic is exact (`fractions`), on parsed syntax trees; nothing is ever evaluated as code.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count

from latent_reasoning.data.implied_constants import implied_constants
from latent_reasoning.data.rows import Row, normalise_question

ATTEMPTS = 20
"""Draws of new numbers tried for one copy."""

MAX_DECIMALS = 2
"""Most decimals of a new result if the old one has any (or the old one's, if more)."""

RESULT_TOLERANCE = Fraction(1, 10**6)

# A number that may be changed: not glued to letters, digits or signs that give it another meaning.
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+")
_GLUED_BEFORE = re.compile(r"(?:[\w/:.,^]|\d\s?-\s?|\d\s/\s?)\Z")
_GLUED_AFTER = re.compile(r"[A-Za-z_/:^]|\s/\s?\d|\s?-\s?\d|\.\d|,\d")
_STEP = re.compile(r"<<([^=<>]+)=([^=<>]+)>>")


@dataclass(frozen=True)
class _Number:
    """A number as written in a text."""

    start: int
    end: int
    text: str
    value: Fraction


@dataclass(frozen=True)
class _Step:
    """A parsed equation: the numbers of its expression, the tree that joins them, its result."""

    expression: str
    numbers: tuple[_Number, ...]
    tree: ast.expr
    result_text: str
    result: Fraction


def perturbed_copies(rows: Iterable[Row], copies: int, seed: int, taken: set[str]) -> list[Row]:
    """Up to `copies` perturbed copies of each row, with ids `{id}-copy-{number from 1}`.

    Args:
        rows: the rows; those that cannot be perturbed give no copies.
        copies: copies tried for each row.
        seed: the copies of a row depend on it and on the row's id, not on the other rows.
        taken: normalised questions that no copy may repeat; those of the copies are added.
    """
    made: list[Row] = []
    for row in rows:
        problem = _Problem.of(row)
        if problem is None:
            continue
        for number in range(1, copies + 1):
            copy_id = f"{row.id}-copy-{number}"
            copy = problem.draw(copy_id, random.Random(f"{seed}/{copy_id}"), taken)
            if copy is not None:
                taken.add(normalise_question(copy.question))
                made.append(copy)
    return made


@dataclass(frozen=True)
class _Free:
    """A value of the question that may change to `low` .. `high` units, but not to itself."""

    value: Fraction
    unit: Fraction
    low: int
    high: int

    def draw(self, generator: random.Random) -> Fraction:
        units = generator.randint(self.low, self.high - 1)
        return (units + (units >= self.value / self.unit)) * self.unit


@dataclass(frozen=True)
class _Origin:
    """Where a number of a step may come from: all origins must agree on its value.

    `places` are indices into the free numbers' new values followed by the steps' new results.
    """

    places: tuple[int, ...]
    constant: Fraction | None

    def follow(self, values: Sequence[Fraction]) -> Fraction | None:
        candidates = [values[place] for place in self.places]
        if self.constant is not None:
            candidates.append(self.constant)
        first = candidates[0]
        return first if all(value == first for value in candidates[1:]) else None


@dataclass(frozen=True)
class _Problem:
    """A row that can be perturbed: what may change, and what follows from it."""

    row: Row
    steps: tuple[_Step, ...]
    numbers: tuple[_Number, ...]
    free: tuple[_Free, ...]
    origins: tuple[tuple[_Origin, ...], ...]

    @classmethod
    def of(cls, row: Row) -> _Problem | None:
        """The row's problem; None for no equations, false ones, a number of unknown origin, or
        nothing that may change."""
        steps = _parse_steps(row.steps)
        if not steps or _value(row.answer) != steps[-1].result:
            return None
        numbers, fixed = _question_numbers(row.question)
        implied = implied_constants(row.question)
        in_steps = {number.value for step in steps for number in step.numbers}
        in_question = {number.value for number in numbers}
        free = sorted((in_question & in_steps) - fixed - implied)
        origins = _origins(steps, free, implied | in_question)
        if not free or origins is None:
            return None
        ranges = tuple(_range(value, numbers, row.question) for value in free)
        if any(own.low == own.high for own in ranges):  # 100 percents
            return None
        return cls(row, steps, numbers, ranges, origins)

    def draw(self, copy_id: str, generator: random.Random, taken: set[str]) -> Row | None:
        """One copy with new numbers; None if no attempt came out clean and new."""
        for _ in range(ATTEMPTS):
            new = [number.draw(generator) for number in self.free]
            chain = self._recompute(new)
            if chain is None:
                continue
            question = self._retell(new)
            if normalise_question(question) in taken:
                continue
            pairs = zip(self.steps, chain, strict=True)
            steps = tuple(_write(step, values, result) for step, (values, result) in pairs)
            return Row(copy_id, question, steps, _like(self.row.answer, chain[-1][1]))
        return None

    def _recompute(self, new: Sequence[Fraction]) -> list[tuple[list[Fraction], Fraction]] | None:
        """Numbers and result of each step; None if one is not clean or not certain."""
        known = list(new)
        chain = []
        for step, origins in zip(self.steps, self.origins, strict=True):
            values = []
            for origin in origins:
                value = origin.follow(known)
                if value is None:
                    return None
                values.append(value)
            result = _evaluate(step.tree, values)
            if result is None or not _is_clean(result, step):
                return None
            known.append(result)
            chain.append((values, result))
        return chain

    def _retell(self, new: Sequence[Fraction]) -> str:
        changes = {free.value: value for free, value in zip(self.free, new, strict=True)}
        question = self.row.question
        for number in reversed(self.numbers):
            if number.value in changes:
                text = _like(number.text, changes[number.value])
                question = question[: number.start] + text + question[number.end :]
        return question


def _origins(
    steps: Sequence[_Step], free: Sequence[Fraction], constants: Collection[Fraction | int]
) -> tuple[tuple[_Origin, ...], ...] | None:
    """The origins of every number of every step; None if a number has none."""
    places: dict[Fraction, list[int]] = {value: [place] for place, value in enumerate(free)}
    origins = []
    for index, step in enumerate(steps):
        of_step = []
        for number in step.numbers:
            constant = number.value in constants and number.value not in free
            if not constant and number.value not in places:
                return None
            of_step.append(
                _Origin(tuple(places.get(number.value, ())), number.value if constant else None)
            )
        origins.append(tuple(of_step))
        places.setdefault(step.result, []).append(len(free) + index)
    return tuple(origins)


def _range(value: Fraction, numbers: Sequence[_Number], question: str) -> _Free:
    """What `value` may become: the same unit (`_unit`), within 50 %, or 3 units if it is small.

    Percentages stay at most 100, and counts at least 2: `1 apples` would not be English.
    """
    places = [number for number in numbers if number.value == value]
    unit: Fraction = min(_unit(number.text) for number in places)
    size = int(value / unit)
    low, high = max(2 if unit == 1 else 1, size // 2), max(size + 3, size * 3 // 2)
    after = (question[number.end :].lstrip() for number in places)
    if value <= 100 and any(text.startswith(("%", "percent")) for text in after):
        high = max(size, min(high, int(100 / unit)))
    return _Free(value, unit, min(low, size), high)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of numbers, + - * / and brackets; None for anything else."""
    tree = _parse(expression)
    values = [number.value for number in _numbers(expression)]
    return None if tree is None else _evaluate(tree, values)


def _parse(expression: str) -> ast.expr | None:
    """The syntax tree, its i-th number as the name `ni` (`.5` and `007` are not Python's)."""
    order = count()
    text = _NUMBER.sub(lambda match: f" n{next(order)} ", expression)
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr, values: Sequence[Fraction]) -> Fraction | None:
    """The value of a tree of `_parse`; None for anything but plain arithmetic, or for x / 0."""
    match node:
        case ast.Name(id=name) if name[1:].isdecimal():
            return values[int(name[1:])]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _evaluate(operand, values)
            return None if value is None else -value
        case ast.BinOp(left=left, op=operator, right=right):
            first, second = _evaluate(left, values), _evaluate(right, values)
            if first is None or second is None:
                return None
            match operator:
                case ast.Add():
                    return first + second
                case ast.Sub():
                    return first - second
                case ast.Mult():
                    return first * second
                case ast.Div() if second:
                    return first / second
    return None


def _parse_steps(steps: Sequence[str] | None) -> tuple[_Step, ...] | None:
    """The equations of all steps; None if one is no equation, or is false."""
    parsed = []
    for step in steps or ():
        match = _STEP.fullmatch(step.strip())
        result = _value(match[2]) if match else None
        tree = _parse(match[1]) if match else None
        if match is None or result is None or tree is None:
            return None
        numbers = _numbers(match[1])
        value = _evaluate(tree, [number.value for number in numbers])
        if value is None or value <= 0 or abs(value - result) > RESULT_TOLERANCE:
            return None
        parsed.append(_Step(match[1], numbers, tree, match[2], result))
    return tuple(parsed)


def _question_numbers(question: str) -> tuple[tuple[_Number, ...], set[Fraction]]:
    """All numbers of a question, and the values of those that may not change."""
    free, glued = [], set()
    for number in _numbers(question):
        before, after = question[: number.start], question[number.end :]
        year = number.value.denominator == 1 and 1900 <= number.value <= 2100
        if _GLUED_BEFORE.search(before) or _GLUED_AFTER.match(after) or year:
            glued.add(number.value)
        free.append(number)
    return tuple(free), glued


def _numbers(text: str) -> tuple[_Number, ...]:
    return tuple(
        _Number(match.start(), match.end(), match.group(), _fraction(match.group()))
        for match in _NUMBER.finditer(text)
    )


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _value(text: str) -> Fraction | None:
    """The value of a text that is a single number; None for any other."""
    text = text.strip()
    return _fraction(text) if _NUMBER.fullmatch(text) else None


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])


def _unit(text: str) -> Fraction:
    """The step in which a number changes: 1,200 in hundreds, 35 in ones, 1.50 in hundredths."""
    if decimals := _decimals(text):
        return Fraction(1, 10**decimals)
    digits = text.replace(",", "")
    return Fraction(10 ** (len(digits) - len(digits.rstrip("0"))))


def _is_clean(result: Fraction, step: _Step) -> bool:
    """Whether a result is positive, and whole if the original is, else of few decimals."""
    if result <= 0:
        return False
    if step.result.denominator == 1:
        return result.denominator == 1
    decimals = max(MAX_DECIMALS, _decimals(step.result_text))
    return (result * 10**decimals).denominator == 1


def _write(step: _Step, values: Sequence[Fraction], result: Fraction) -> str:
    expression = step.expression
    for number, value in reversed(list(zip(step.numbers, values, strict=True))):
        if value != number.value:
            text = _like(number.text, value)
            expression = expression[: number.start] + text + expression[number.end :]
    return f"<<{expression}={_like(step.result_text, result)}>>"


def _like(pattern: str, value: Fraction) -> str:
    """`value` written like `pattern`: with its commas, trailing zeros and leading point."""
    decimals = _decimals(pattern) if pattern.endswith("0") else 0
    while (value * 10**decimals).denominator != 1:
        decimals += 1
    digits = str(int(value * 10**decimals)).rjust(decimals + 1, "0")
    whole, rest = (digits[:-decimals], digits[-decimals:]) if decimals else (digits, "")
    if "," in pattern:
        whole = f"{int(whole):,}"
    if pattern.startswith(".") and whole == "0":
        whole = ""
    return f"{whole}.{rest}" if rest else whole
