"""The shuffle and cut of train, and the rows it drops."""

from __future__ import annotations

import pytest
from latent_reasoning.data.splits import keep_numeric, keep_unseen, questions_of, split_positions

from latent_reasoning.data.rows import Row


def rows(*answers: str) -> list[Row]:
    return [Row(f"train-{i}", f"q{i}?", (), answer) for i, answer in enumerate(answers)]


def test_the_cut_of_ten_rows_is_that_of_the_public_code() -> None:
    sft, rl = split_positions(10, 0.85, 42)
    assert sft.tolist() == [5, 6, 0, 7, 3, 2, 4, 9]  # round(8.5) is 8: half to even
    assert rl.tolist() == [1, 8]


def test_the_cut_at_full_size_has_the_papers_numbers() -> None:
    sft, rl = split_positions(385_620, 0.85, 42)
    assert (len(sft), len(rl)) == (327_777, 57_843)
    assert sft[:3].tolist() == [371222, 315834, 151618]
    assert rl[-3:].tolist() == [131009, 129997, 75400]


def test_all_rows_may_be_sfts() -> None:
    sft, rl = split_positions(7, 1.0, 42)
    assert (sorted(sft), len(rl)) == (list(range(7)), 0)


@pytest.mark.parametrize(
    ("drop_negative", "kept", "dropped"),
    [
        (False, ["train-0", "train-1", "train-3"], {"answer_not_a_number": 2}),
        (True, ["train-0", "train-3"], {"answer_not_a_number": 2, "negative_answer": 1}),
    ],
)
def test_dropped_answers_are_counted_by_reason(drop_negative, kept, dropped) -> None:
    result, counts = keep_numeric(rows("1,200", "-5", "1/2", "-0", ""), drop_negative=drop_negative)
    assert [row.id for row in result] == kept
    assert dict(counts) == dropped


def test_a_training_question_that_is_held_out_is_dropped_whatever_its_white_space() -> None:
    held_out = questions_of([Row("test-0", "How  many\neggs?", None, "1")])
    train = [Row("train-0", "How many eggs? ", (), "1"), Row("train-1", "how many eggs?", (), "1")]
    kept, dropped = keep_unseen(train, held_out)
    assert [row.id for row in kept] == ["train-1"]
    assert dict(dropped) == {"in_validation_or_test": 1}
