"""Styles of reasoning text."""

from __future__ import annotations

import pytest

from latent_reasoning.config import ReasoningMix
from latent_reasoning.data.dial.styles import STYLES, step_result, styled_reasonings
from latent_reasoning.data.rows import DataError, Row

ROW = Row("train-0", "q", ("<<(6+6)%7=5>>", "<<(5*2)%7=3>>", "<<(3-1)%7=2>>"), "2")
ROWS = [Row(f"train-{i}", "q", ROW.steps, "2") for i in range(400)]


def only(**shares) -> ReasoningMix:
    return ReasoningMix(**({"full": 0.0} | shares))


def test_the_styles_are_those_of_the_configuration():
    assert list(STYLES) == list(ReasoningMix.model_fields)


@pytest.mark.parametrize(
    ("style", "texts"),
    [
        ("full", {"<<(6+6)%7=5>><<(5*2)%7=3>><<(3-1)%7=2>>"}),
        ("drop_last", {"<<(6+6)%7=5>><<(5*2)%7=3>>"}),
        ("truncated", {"", "<<(6+6)%7=5>>", "<<(6+6)%7=5>><<(5*2)%7=3>>"}),
        ("results_only", {" Results: 5 3 2."}),
        ("results_only_drop_last", {" Results: 5 3."}),
        ("results_only_truncated", {" Results:.", " Results: 5.", " Results: 5 3."}),
        ("results_only_waiting", {f" Results: 5 3 2{' 2' * more}." for more in range(1, 8)}),
    ],
)
def test_the_texts_of_each_style(style, texts):
    assert set(styled_reasonings(ROWS, only(**{style: 1.0}), seed=0)) == texts


@pytest.mark.parametrize(
    ("style", "of_three", "of_one"),
    [
        ("full", "<<(6+6)%7=5>><<(5*2)%7=3>>", ""),
        ("results_only", " Results: 5 3.", " Results:."),
        ("drop_last", "<<(6+6)%7=5>>", ""),
        ("truncated", None, ""),
        ("results_only_waiting", None, " Results:."),
    ],
)
def test_the_last_step_is_dropped_before_the_style_applies(style, of_three, of_one):
    one = Row("train-0", "q", ROW.steps[:1], "5")
    mix = only(**{style: 1.0})
    texts = styled_reasonings([ROW, one], mix, seed=0, drop_last_step=True)
    assert texts == [of_three or texts[0], of_one]


def test_a_row_of_many_steps_does_not_wait():
    row = Row("train-0", "q", ("<<1+1=2>>",) * 12, "2")
    texts = styled_reasonings([row], only(results_only_waiting=1.0), seed=0)
    assert texts == [f" Results:{' 2' * 12}."]


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


def test_step_result_reads_what_follows_the_last_equals_sign():
    assert step_result("<<600*30/100=180>>") == "180"
    with pytest.raises(ValueError, match="not of the form"):
        step_result("600*30/100=180")
