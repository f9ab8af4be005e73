"""Numeric perturbation: what changes, what follows, and which rows are left alone."""

from __future__ import annotations

import random
import re
from fractions import Fraction

import pytest

from latent_reasoning.data.implied_constants import implied_constants
from latent_reasoning.data.perturbation import evaluate, perturbed_copies
from latent_reasoning.data.rows import Row

CLIPS = Row(
    "train-0",
    "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
    ("<<48/2=24>>", "<<48+24=72>>"),
    "72",
)


def copies_of(row: Row, copies: int = 20, seed: int = 0) -> list[Row]:
    return perturbed_copies([row], copies, seed, set())


def test_the_chain_follows_the_new_numbers() -> None:
    copies = copies_of(CLIPS)
    assert len(copies) > 10
    for copy in copies:
        (new,) = map(int, re.findall(r"\d+", copy.question))
        assert new != 48
        assert 24 <= new <= 72
        assert copy.steps == (f"<<{new}/2={new // 2}>>", f"<<{new}+{new // 2}={new * 3 // 2}>>")
        assert copy.answer == str(new * 3 // 2)
        assert copy.question == CLIPS.question.replace("48", str(new))


def test_copies_are_named_after_their_row_and_depend_on_seed_and_id_alone() -> None:
    copies = copies_of(CLIPS, copies=5)
    assert {copy.id for copy in copies} <= {f"train-0-copy-{i}" for i in range(1, 6)}
    assert len({copy.question for copy in copies}) == len(copies)
    other = Row("train-1", "A box has 30 eggs, 12 broken. How many whole?", ("<<30-12=18>>",), "18")
    alone = copies_of(other)
    assert alone == perturbed_copies([CLIPS, other], 20, 0, set())[-len(alone) :]
    assert alone != copies_of(other, seed=1)


def test_no_copy_repeats_a_taken_question() -> None:
    first = copies_of(CLIPS, copies=1)[0]
    taken = {first.question}
    again = perturbed_copies([CLIPS], 1, 0, taken)
    assert again[0].question != first.question
    assert taken == {first.question, again[0].question}


def test_formats_of_numbers_are_kept() -> None:
    row = Row(
        "train-0",
        "He pays $80,000 and .5 of $1,200.50. How much?",
        ("<<.5*1200.50=600.25>>", "<<80000+600.25=80600.25>>"),
        "80600.25",
    )
    copies = copies_of(row)
    assert copies
    for copy in copies:
        assert re.fullmatch(
            r"He pays \$[\d,]+0,000 and \.[2-8] of \$[\d,]+\.\d\d\. How much\?", copy.question
        )
        assert re.match(r"<<\.\d\*\d+\.\d\d=", copy.steps[0])


def test_results_stay_positive_and_whole_where_they_were() -> None:
    question = "30 eggs, 12 broken, in boxes of 6. How many?"
    row = Row("train-0", question, ("<<30-12=18>>", "<<18/6=3>>"), "3")
    copies = copies_of(row, copies=50)
    assert len(copies) > 10
    for copy in copies:
        assert int(copy.answer) > 0
        assert all(
            evaluate(expression) == int(result)
            for expression, result in (step[2:-2].split("=") for step in copy.steps or ())
        )


@pytest.mark.parametrize(
    ("question", "steps", "answer"),
    [
        ("Two dogs eat 2 kg twice. How much?", ("<<2*2=4>>",), "4"),  # which 2 is which?
        ("He walks 1/2 of 3/4 mile. How far?", ("<<3*1/2=1.5>>",), "1.5"),  # parts of fractions
        ("Born in 1990, how old in 2020?", ("<<2020-1990=30>>",), "30"),  # years
        ("From 5:30 to 9pm?", ("<<9-5=4>>",), "4"),  # times of day
        ("He has 13 apples and a few more.", ("<<13+17=30>>",), "30"),  # 17 from nowhere
        ("He has 13 apples and 5 more.", ("<<13+5=18>>",), "19"),  # the answer is not the result
        ("He has 13 apples and 5 more.", ("<<13+5=19>>",), "19"),  # a false equation
        ("He has 13 apples and 5 more.", ("He adds 13 and 5.",), "18"),  # sentences
        ("He is in the 100 percentile of 5 classes.", ("<<100*5=500>>",), "500"),  # at most 100
        ("He has 13 apples and 5 more.", (), "18"),
        ("He has 13 apples and 5 more.", None, "18"),
    ],
)
def test_rows_of_uncertain_or_fixed_numbers_are_left_alone(question, steps, answer) -> None:
    assert copies_of(Row("train-0", question, steps, answer)) == []


def test_a_number_that_is_also_a_result_is_followed_only_where_both_agree() -> None:
    """10 is a number of the question and the first result: the last step is certain only where
    they stay equal."""
    question = "5 bags of 2.5 kg, 10 boxes, 12.5 off?"
    row = Row("train-0", question, ("<<5*2.5=12.5>>", "<<10+12.5=22.5>>"), "22.5")
    for copy in copies_of(row, copies=50):
        bags, kilograms, boxes, off = map(Fraction, re.findall(r"\d+(?:\.\d+)?", copy.question))
        assert bags * kilograms == off
        assert evaluate(copy.answer) == boxes + off


def test_percentages_stay_below_a_hundred_and_their_hundred_stays() -> None:
    row = Row("train-0", "90% of 300 people came. How many?", ("<<90/100*300=270>>",), "270")
    copies = copies_of(row)
    assert copies
    for copy in copies:
        percent, people = map(int, re.findall(r"\d+", copy.question))
        assert percent <= 100
        assert copy.steps == (f"<<{percent}/100*{people}={percent * people // 100}>>",)


def test_words_imply_constants() -> None:
    assert implied_constants("Twice a week, a dozen eggs at 5%") >= {2, 7, 12, 100}
    assert implied_constants("Nothing here") == {0, 1}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2*(3+4)-.5", Fraction(27, 2)),
        ("1/3*3", Fraction(1)),
        ("007-10", Fraction(-3)),
        ("-(2)", Fraction(-2)),
        ("1/0", None),
        ("2**9", None),
        ("5%3", None),
        ("n0", None),
        ("__import__('os')", None),
        ("2 3", None),
        ("", None),
    ],
)
def test_expressions_are_plain_arithmetic_or_nothing(expression, value) -> None:
    assert evaluate(expression) == value


def test_random_expressions_have_their_exact_value() -> None:
    generator = random.Random(0)
    for _ in range(200):
        signs = [*generator.choices("+-*", k=3), ""]
        text = "".join(f"{generator.randint(1, 99)}{sign}" for sign in signs)
        assert evaluate(text) == eval(text)
