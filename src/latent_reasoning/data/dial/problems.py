"""Generated word problems in the form of GSM8K-Aug: the data of the laptop experiment.

A problem is a chain of ``k`` operations on a dial that wraps around (arithmetic modulo
``modulus``). Its text has one operation per sentence, in order, and **the start value last**, so
that nothing can be computed while the operations are being read::

    Monday plus 6. Tuesday times 2. Fay's dial of 7 starts at 6. Where does it end?
    <<(6+6)%7=5>><<(5*2)%7=3>>                                               -> 3

Wrapping around is what makes the problem need ``k`` sequential steps: without a modulus the sum can
be read off in parallel, and a model learns the answer with no reasoning at all.

With ``references``, an operation may name an earlier day instead of a number, and then takes that
day's result: what is looked up makes a problem harder than a longer chain does::

    Monday plus 4. Tuesday plus 1. Wednesday times Monday's. Kim's dial of 7 starts at 2. ..
    <<(2+4)%7=6>><<(6+1)%7=0>><<(0*6)%7=0>>                                   -> 0

Everything here is a pure function of its arguments: the same seed gives the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypedDict

NAMES = (
    *("Ada", "Ben", "Cal", "Dan", "Eva", "Fay", "Gus", "Ida"),
    *("Jon", "Kim", "Leo", "Mia", "Ned", "Pam", "Ray", "Sue"),
)
OBJECTS = ("clock", "counter", "dial", "gauge", "lock", "meter", "timer", "wheel")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
BEGIN_VERBS = ("begins", "starts")
END_VERBS = ("end", "finish", "stop")

OPERATION_WORDS = {"+": "plus", "-": "minus", "*": "times"}
OPERATION_WEIGHTS = {"+": 0.3, "-": 0.3, "*": 0.4}
APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda value, operand: value + operand,
    "-": lambda value, operand: value - operand,
    "*": lambda value, operand: value * operand,
}

# There are too few problems of fewer operations to keep them apart between splits (119 and 2,023
# for modulus 7): those differ only in their questions, longer ones also in their problems.
FIRST_HELD_OUT_STEP_COUNT = 3

Operand = int | str
"""A number, or the name of the earlier day whose result it is."""
Operation = tuple[str, Operand]
Problem = tuple[int, tuple[Operation, ...]]


class GeneratedRow(TypedDict):
    """One generated example, in the columns of GSM8K-Aug."""

    question: str
    steps: list[str]
    answer: str


def generate_splits(
    train: int,
    validation: int,
    test: int,
    *,
    max_steps: int,
    step_weights: Sequence[float],
    modulus: int,
    seed: int,
    references: float = 0.0,
) -> dict[str, list[GeneratedRow]]:
    """Generate ``train``, ``validation`` and ``test`` rows whose questions are all different.

    Test rows are drawn first, then validation, then training rows, so that changing the size of
    the training split leaves the other two as they are. From ``FIRST_HELD_OUT_STEP_COUNT``
    operations on, the *problem* (operations and start value, whatever the wording) is in one split
    only.

    Args:
        train: number of training rows.
        validation: number of validation rows.
        test: number of test rows.
        max_steps: longest chain, at most ``len(DAYS)``.
        step_weights: relative frequency of chains of 1, 2, .. ``max_steps`` operations.
        modulus: the dial's number of marks, at least 3; values are ``0 .. modulus - 1``.
        seed: seed of the generator.
        references: probability that an operation, from the third on, names an earlier day.

    Raises:
        ValueError: for a size, ``max_steps``, ``step_weights`` or ``modulus`` out of range, or if
            there are too few different questions to fill the splits.
    """
    _check_arguments(train, validation, test, max_steps, step_weights, modulus)
    shape = max_steps, step_weights, modulus, references, random.Random(seed)
    questions: set[str] = set()
    problems_of_other_splits: set[Problem] = set()
    splits: dict[str, list[GeneratedRow]] = {}
    for name, size in (("test", test), ("validation", validation), ("train", train)):
        rows, problems = _generate_rows(size, *shape, questions, problems_of_other_splits)
        splits[name] = rows
        problems_of_other_splits |= problems
    return {name: splits[name] for name in ("train", "validation", "test")}


def _check_arguments(
    train: int,
    validation: int,
    test: int,
    max_steps: int,
    step_weights: Sequence[float],
    modulus: int,
) -> None:
    if min(train, validation, test) < 0:
        raise ValueError(f"split sizes are negative: {train}, {validation}, {test}")
    if not 1 <= max_steps <= len(DAYS):
        raise ValueError(f"max_steps is {max_steps}, allowed are 1 to {len(DAYS)}")
    if len(step_weights) != max_steps:
        raise ValueError(f"{len(step_weights)} step_weights for max_steps {max_steps}")
    if min(step_weights) < 0 or sum(step_weights) <= 0:
        raise ValueError(f"step_weights are not a distribution: {list(step_weights)}")
    if modulus < 3:
        raise ValueError(f"modulus is {modulus}, the least allowed is 3")


def _generate_rows(
    size: int,
    max_steps: int,
    step_weights: Sequence[float],
    modulus: int,
    references: float,
    generator: random.Random,
    questions: set[str],
    problems_of_other_splits: set[Problem],
) -> tuple[list[GeneratedRow], set[Problem]]:
    """``size`` new rows and their held-out problems; adds their questions to ``questions``.

    A repeated draw is replaced by another of the same number of steps: their distribution stays.
    """
    rows: list[GeneratedRow] = []
    problems: set[Problem] = set()
    step_counts = generator.choices(range(1, max_steps + 1), weights=step_weights, k=size)
    for step_count in step_counts:
        for _ in range(1000):
            problem = _draw_problem(step_count, modulus, references, generator)
            question = _tell(problem, modulus, generator)
            if question not in questions and problem not in problems_of_other_splits:
                break
        else:
            raise ValueError(
                f"too few different questions of {step_count} steps to fill the splits"
            )
        questions.add(question)
        if step_count >= FIRST_HELD_OUT_STEP_COUNT:
            problems.add(problem)
        rows.append(_solve(problem, question, modulus))
    return rows, problems


def _draw_problem(
    step_count: int, modulus: int, references: float, generator: random.Random
) -> Problem:
    """A start value and ``step_count`` operations.

    No operation with a number leaves every value as it is.
    """
    signs = generator.choices(
        tuple(OPERATION_WEIGHTS), weights=tuple(OPERATION_WEIGHTS.values()), k=step_count
    )
    operations = tuple(
        (sign, _draw_operand(sign, position, modulus, references, generator))
        for position, sign in enumerate(signs)
    )
    return generator.randrange(modulus), operations


def _draw_operand(
    sign: str, position: int, modulus: int, references: float, generator: random.Random
) -> Operand:
    """A number; or an earlier day, but never the one before, whose result is the value itself."""
    if references and position >= 2 and generator.random() < references:
        return generator.choice(DAYS[: position - 1])
    return generator.randrange(2 if sign == "*" else 1, modulus)


def _tell(problem: Problem, modulus: int, generator: random.Random) -> str:
    start, operations = problem
    name, thing = generator.choice(NAMES), generator.choice(OBJECTS)
    begins, end = generator.choice(BEGIN_VERBS), generator.choice(END_VERBS)
    sentences = [
        f"{day} {OPERATION_WORDS[sign]} {_name(operand)}."
        for day, (sign, operand) in zip(DAYS, operations, strict=False)
    ]
    sentences += [f"{name}'s {thing} of {modulus} {begins} at {start}.", f"Where does it {end}?"]
    return " ".join(sentences)


def _name(operand: Operand) -> str:
    return str(operand) if isinstance(operand, int) else f"{operand}'s"


def _solve(problem: Problem, question: str, modulus: int) -> GeneratedRow:
    value, operations = problem
    steps = []
    results: dict[str, int] = {}
    for day, (sign, operand) in zip(DAYS, operations, strict=False):
        number = operand if isinstance(operand, int) else results[operand]
        results[day] = APPLY[sign](value, number) % modulus
        steps.append(f"<<({value}{sign}{number})%{modulus}={results[day]}>>")
        value = results[day]
    return GeneratedRow(question=question, steps=steps, answer=str(value))
