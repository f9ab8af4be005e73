"""Statistics against values known in closed form or from the literature."""

import math

import pandas
import pytest

from latent_reasoning.evaluation import metrics
from latent_reasoning.evaluation.metrics import PairedCounts, paired_counts, wilson_interval


def test_wilson_interval_solves_its_defining_equation():
    # The bounds are the shares p whose z-test against 30 of 100 is exactly at the 5 % level.
    for bound in wilson_interval(30, 100):
        z = abs(0.3 - bound) / math.sqrt(bound * (1 - bound) / 100)
        assert z == pytest.approx(1.959963984540054)


def test_wilson_interval_of_the_papers_figure_and_at_both_ends():
    # 656 of 1,319 rows is the published 49.73 %.
    assert wilson_interval(656, 1319) == pytest.approx((0.4704, 0.5243), abs=1e-4)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(0.277533, abs=1e-6))
    assert wilson_interval(10, 10)[1] == 1.0


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_what_is_no_share(correct, n):
    with pytest.raises(ValueError, match="not a share"):
        wilson_interval(correct, n)


@pytest.mark.parametrize(
    ("only_model", "only_reference", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 6, 2 / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (5, 5, 1.0),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_is_the_exact_two_sided_binomial(only_model, only_reference, p):
    counts = PairedCounts(100, 50, only_model, only_reference)
    assert counts.p_mcnemar == pytest.approx(p)


def test_mcnemar_of_thousands_of_rows_does_not_overflow():
    assert PairedCounts(2000, 600, 1300, 1).p_mcnemar == 0.0
    assert PairedCounts(4000, 0, 2000, 2000).p_mcnemar == 1.0


def test_paired_counts_match_rows_by_id_not_by_order():
    model = pandas.DataFrame({"id": ["a", "b", "c", "d"], "correct": [True, True, False, False]})
    reference = pandas.DataFrame({"id": list("dcba"), "correct": [False, True, False, True]})
    assert paired_counts(model, reference) == PairedCounts(4, 1, 1, 1)


def test_paired_counts_refuse_different_rows():
    model = pandas.DataFrame({"id": ["a"], "correct": [True]})
    other = pandas.DataFrame({"id": ["b"], "correct": [True]})
    with pytest.raises(ValueError, match="not of the same rows"):
        paired_counts(model, other)


def test_pearson_is_1_on_a_line_and_none_where_nothing_varies():
    x = pandas.Series([1, 2, 3, None], dtype="Int64")
    assert metrics.pearson(x, pandas.Series([2, 4, 6, 0])) == pytest.approx(1.0)
    assert metrics.pearson(x, pandas.Series([8, 8, 8, 1])) is None
    hand = metrics.pearson(pandas.Series([1, 2, 3]), pandas.Series([1, 3, 2]))
    assert hand == pytest.approx(0.5)


@pytest.fixture
def predictions():
    return pandas.DataFrame(
        {
            "correct": [True, False, True, True],
            "well_formatted": [True, False, True, True],
            "cut_off": [False, True, False, False],
            "reasoning_tokens": [3, 9, 4, 4],
            "gold_steps": pandas.array([1, 3, 3, None], dtype="Int64"),
        }
    )


def test_summary_counts_bad_rows_as_wrong_and_with_their_length(predictions):
    assert metrics.summarise(predictions, 1.5) == {
        "n": 4,
        "correct": 3,
        "accuracy": 0.75,
        "accuracy_ci95": list(wilson_interval(3, 4)),
        "reasoning_tokens_mean": 5.0,
        "reasoning_tokens_std": pytest.approx(math.sqrt((4 + 16 + 1 + 1) / 4)),
        "reasoning_tokens_min": 3,
        "reasoning_tokens_max": 9,
        "badly_formatted": 1,
        "cut_off": 1,
        "seconds": 1.5,
    }


def test_by_steps_leaves_out_rows_without_steps(predictions):
    assert metrics.by_steps(predictions).to_dict("list") == {
        "gold_steps": [1, 3],
        "n": [1, 2],
        "correct": [1, 1],
        "accuracy": [1.0, 0.5],
        "reasoning_tokens_mean": [3.0, 6.5],
    }
