"""Generated word problems in the form of GSM8K-Aug: the data of the laptop experiment.

A problem is a chain of ``k`` operations on a dial that wraps around (arithmetic modulo
``modulus``), told one operation a sentence and in order, with **the start value last**, so that
nothing can be computed while the operations are being read::

    Monday plus 6. Tuesday times 2. Fay's dial of 7 starts at 6. Where does it end?
    <<(6+6)%7=5>><<(5*2)%7=3>>                                               -> 3

Wrapping around is what makes the problem need ``k`` sequential steps: without a modulus the sum can
be read off in parallel, and a model learns the answer with no reasoning at all.

Everything here is a pure function of its arguments: the same seed gives the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Literal, TypedDict, get_args

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

# Problems of fewer operations are too few to be kept apart between splits (119 and 2,023 for
# modulus 7): there the splits differ in their questions, above it also in their problems.
FIRST_HELD_OUT_STEP_COUNT = 3

PretrainingStyle = Literal[
    "full",
    "last_step_dropped",
    "truncated",
    "results_only",
    "results_only_last_step_dropped",
    "results_only_truncated",
    "results_only_waiting",
]
PRETRAINING_STYLES: tuple[PretrainingStyle, ...] = get_args(PretrainingStyle)
RESULTS_PREFIX = " Results:"
RESULTS_END = "."
MOST_RESULTS = 10

Operation = tuple[str, int]
Problem = tuple[int, tuple[Operation, ...]]


class Row(TypedDict):
    """One example, in the columns of GSM8K-Aug."""

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
) -> dict[str, list[Row]]:
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

    Raises:
        ValueError: for a size, ``max_steps``, ``step_weights`` or ``modulus`` out of range, or if
            there are too few different questions to fill the splits.
    """
    _check_arguments(train, validation, test, max_steps, step_weights, modulus)
    generator = random.Random(seed)
    questions: set[str] = set()
    problems_of_other_splits: set[Problem] = set()
    splits: dict[str, list[Row]] = {}
    for name, size in (("test", test), ("validation", validation), ("train", train)):
        rows, problems = _generate_rows(
            size, max_steps, step_weights, modulus, generator, questions, problems_of_other_splits
        )
        splits[name] = rows
        problems_of_other_splits |= problems
    return {name: splits[name] for name in ("train", "validation", "test")}


def pretraining_reasoning(
    row: Row, style: PretrainingStyle, generator: random.Random | None = None
) -> str:
    """The reasoning text of one training example of the base model.

    The base has to stand in for a pretrained language model, which has seen both verbose and terse
    working, and working that leaves steps out:

    - ``full``: every step, ``<<(6+6)%7=5>><<(5*2)%7=3>>``;
    - ``last_step_dropped``: all but the last step;
    - ``truncated``: the first ``j`` steps, ``j`` uniform in ``0 .. k - 1``;
    - ``results_only`` and its two shortened forms: the steps' results alone, `` Results: 5 3.``;
    - ``results_only_waiting``: the same with the last result repeated, to a length drawn uniformly
      from ``k + 1 .. MOST_RESULTS``, `` Results: 5 3 3 3.``.

    Args:
        row: the example.
        style: one of ``PRETRAINING_STYLES``.
        generator: source of the lengths; needed for the truncated and the waiting styles only.

    Raises:
        ValueError: for an unknown style, or one that draws a length without ``generator``.
    """
    if style not in PRETRAINING_STYLES:
        raise ValueError(f"style {style!r} is not one of {', '.join(PRETRAINING_STYLES)}")
    if generator is None and style.endswith(("truncated", "waiting")):
        raise ValueError(f"style {style!r} needs a generator")
    steps = row["steps"]
    if style.endswith("last_step_dropped"):
        steps = steps[:-1]
    elif style.endswith("truncated"):
        steps = steps[: generator.randrange(len(steps))]
    elif style.endswith("waiting"):
        steps = steps + steps[-1:] * generator.randint(1, MOST_RESULTS - len(steps))
    return results_only(steps) if style.startswith("results_only") else "".join(steps)


def results_only(steps: Sequence[str]) -> str:
    """The terse text of ``steps``: `` Results: 5 3.`` for ``<<(6+6)%7=5>><<(5*2)%7=3>>``."""
    return RESULTS_PREFIX + "".join(f" {step_result(step)}" for step in steps) + RESULTS_END


def step_result(step: str) -> str:
    """The result of a step, the text between its last ``=`` and ``>>``.

    Raises:
        ValueError: if ``step`` is not of the form ``<<expression=result>>``.
    """
    expression, separator, result = step.rpartition("=")
    if not (separator and expression.startswith("<<") and result.endswith(">>")):
        raise ValueError(f"step {step!r} is not of the form <<expression=result>>")
    return result.removesuffix(">>")


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
    generator: random.Random,
    questions: set[str],
    problems_of_other_splits: set[Problem],
) -> tuple[list[Row], set[Problem]]:
    """``size`` new rows and their held-out problems; adds their questions to ``questions``.

    A repeated draw is replaced by one of the same number of steps, which keeps their distribution.
    """
    rows: list[Row] = []
    problems: set[Problem] = set()
    step_counts = generator.choices(range(1, max_steps + 1), weights=step_weights, k=size)
    for step_count in step_counts:
        for _ in range(1000):
            problem = _draw_problem(step_count, modulus, generator)
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


def _draw_problem(step_count: int, modulus: int, generator: random.Random) -> Problem:
    """A start value and ``step_count`` operations. No operation leaves every value as it is."""
    signs = generator.choices(
        tuple(OPERATION_WEIGHTS), weights=tuple(OPERATION_WEIGHTS.values()), k=step_count
    )
    operations = tuple(
        (sign, generator.randrange(2 if sign == "*" else 1, modulus)) for sign in signs
    )
    return generator.randrange(modulus), operations


def _tell(problem: Problem, modulus: int, generator: random.Random) -> str:
    start, operations = problem
    name, thing = generator.choice(NAMES), generator.choice(OBJECTS)
    begins, end = generator.choice(BEGIN_VERBS), generator.choice(END_VERBS)
    sentences = [
        f"{day} {OPERATION_WORDS[sign]} {operand}."
        for day, (sign, operand) in zip(DAYS, operations, strict=False)
    ]
    sentences += [f"{name}'s {thing} of {modulus} {begins} at {start}.", f"Where does it {end}?"]
    return " ".join(sentences)


def _solve(problem: Problem, question: str, modulus: int) -> Row:
    value, operations = problem
    steps = []
    for sign, operand in operations:
        result = APPLY[sign](value, operand) % modulus
        steps.append(f"<<({value}{sign}{operand})%{modulus}={result}>>")
        value = result
    return Row(question=question, steps=steps, answer=str(value))
