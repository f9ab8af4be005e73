"""Styles of reasoning text."""

from __future__ import annotations

import pytest

from latent_reasoning.config import ReasoningMix
from latent_reasoning.data.dial.styles import styled_reasonings
from latent_reasoning.data.rows import DataError, Row

ROW = Row("train-0", "q", ("<<(6+6)%7=5>>", "<<(5*2)%7=3>>", "<<(3-1)%7=2>>"), "2")
ROWS = [Row(f"train-{i}", "q", ROW.steps, "2") for i in range(400)]


def only(**shares) -> ReasoningMix:
    return ReasoningMix(**({"full": 0.0} | shares))


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("full", "<<(6+6)%7=5>><<(5*2)%7=3>><<(3-1)%7=2>>"),
        ("drop_last", "<<(6+6)%7=5>><<(5*2)%7=3>>"),
        ("results_only", " Results: 5 3 2."),
        ("results_only_drop_last", " Results: 5 3."),
    ],
)
def test_each_style_of_one_row(style, expected):
    assert styled_reasonings([ROW], only(**{style: 1.0}), seed=0) == [expected]


def test_the_last_step_is_dropped_before_the_style_applies():
    texts = styled_reasonings([ROW], only(results_only=1.0), seed=0, drop_last_step=True)
    assert texts == [" Results: 5 3."]
    texts = styled_reasonings([ROW], only(full=1.0), seed=0, drop_last_step=True)
    assert texts == ["<<(6+6)%7=5>><<(5*2)%7=3>>"]


def test_truncation_keeps_any_number_of_first_steps_but_not_all():
    lengths = {text.count("<<") for text in styled_reasonings(ROWS, only(truncated=1.0), seed=0)}
    assert lengths == {0, 1, 2}
    one_step = Row("train-0", "q", ROW.steps[:1], "5")
    texts = styled_reasonings([one_step], only(truncated=1.0), seed=0, drop_last_step=True)
    assert texts == [""]


def test_shares_are_kept_and_a_rows_style_depends_on_seed_and_id_alone():
    mix = only(full=1.0, results_only=3.0)
    texts = styled_reasonings(ROWS, mix, seed=0)
    terse = sum(text.startswith(" Results:") for text in texts)
    assert 270 < terse < 330
    assert styled_reasonings(ROWS[::-1], mix, seed=0)[::-1] == texts
    assert styled_reasonings(ROWS, mix, seed=1) != texts


def test_steps_that_are_no_equations_cannot_be_shortened_to_results():
    row = Row("train-7", "q", ("He eats two.",), "2")
    with pytest.raises(DataError, match="row train-7"):
        styled_reasonings([row], only(results_only=1.0), seed=0)
    with pytest.raises(DataError, match="not sentences"):
        styled_reasonings([row], only(drop_last=1.0), seed=0, natural_language=True)
    texts = styled_reasonings([row], only(full=1.0), seed=0, natural_language=True)
    assert texts == [" He eats two."]
