"""Values and counterfactual answers from a row's own equations."""

from __future__ import annotations

from fractions import Fraction

import pytest

from latent_reasoning.data.rows import Row
from latent_reasoning.inside.equations import counterfactual, evaluate, is_chain, read_equations


def equations(*steps: str):
    return read_equations(Row("test-0", "q", steps, "0"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(4+2)%7", 6),
        ("(0-6)%7", 1),
        ("48/2", 24),
        ("0.1*3", Fraction(3, 10)),
        ("-2*(1/3)", Fraction(-2, 3)),
        ("7//2", 3),
        ("2**9", None),
        ("1/0", None),
        ("x+1", None),
        ("20%*5", None),
        ("True+1", None),
        ("", None),
    ],
)
def test_an_expression_of_numbers_has_its_exact_value(text, value):
    assert evaluate(text) == value


def test_equations_are_read_with_or_without_marks():
    read = equations("<<48/2=24>>", "24+48=72")
    assert [(e.expression, e.result, e.value) for e in read] == [
        ("48/2", "24", 24),
        ("24+48", "72", 72),
    ]


@pytest.mark.parametrize("step", ["<<48/2=25>>", "no equation", "<<=4>>", "<<a=4>>", "<<4+=4>>"])
def test_a_row_with_a_step_that_does_not_hold_has_no_equations(step):
    assert equations("<<1+1=2>>", step) == ()


def test_a_chain_uses_each_result_at_one_certain_place():
    assert is_chain(equations("<<(4+2)%7=6>>", "<<(6*5)%7=2>>"))
    assert is_chain(equations("<<1+1=2>>"))
    assert not is_chain(equations("<<4+2=6>>", "<<3+5=8>>"))
    assert not is_chain(equations("<<4+2=6>>", "<<6*6=36>>"))
    assert not is_chain(())


def test_the_counterfactual_answer_carries_on_from_the_other_value():
    chain = equations("<<(4+2)%7=6>>", "<<(6*5)%7=2>>", "<<(2+6)%7=1>>")
    assert counterfactual(chain, 1, Fraction(3)) == ((3 * 5) % 7 + 6) % 7
    assert counterfactual(chain, 2, Fraction(0)) == 6
    assert counterfactual(chain, 3, Fraction(5)) == 5
    assert counterfactual(equations("<<4-1=3>>", "<<6/3=2>>"), 1, Fraction(0)) is None
    assert counterfactual(equations("<<4-1=3>>", "<<3*2=6>>"), 1, Fraction(-5, 2)) == -5
