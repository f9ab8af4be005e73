"""The files of an evaluation have the names, columns and types of the contract."""

import json

import pandas
import pytest

from latent_reasoning.evaluation.records import (
    Evaluation,
    ForcedPoint,
    Prediction,
    write_evaluation,
)


@pytest.fixture
def evaluation():
    right = Prediction(
        id="test-0",
        question="How many?",
        answer="7",
        completion="<|CONTINUE|><|STOP|> The answer is: 7",
        extracted="7",
        correct=True,
        well_formatted=True,
        cut_off=False,
        reasoning_tokens=3,
        latent_steps=1,
        gold_steps=2,
    )
    bad = Prediction(
        id="test-1",
        question="Why?",
        answer="8",
        completion="<|CONTINUE|><|CONTINUE|>",
        extracted=None,
        correct=False,
        well_formatted=False,
        cut_off=True,
        reasoning_tokens=3,
        latent_steps=2,
        gold_steps=None,
    )
    return Evaluation([right, bad], [ForcedPoint(0, 2, 0), ForcedPoint(1, 2, 1)], seconds=0.25)


def test_an_evaluation_is_four_files(evaluation, tmp_path):
    write_evaluation(tmp_path / "test", evaluation)
    assert {path.name for path in (tmp_path / "test").iterdir()} == {
        "summary.json",
        "predictions.parquet",
        "forced.csv",
        "by_steps.csv",
        "SHA256SUMS",
    }


def test_predictions_keep_their_columns_types_and_nulls(evaluation, tmp_path):
    write_evaluation(tmp_path / "test", evaluation)
    frame = pandas.read_parquet(tmp_path / "test" / "predictions.parquet")
    assert list(frame.columns) == [
        "id",
        "question",
        "answer",
        "completion",
        "extracted",
        "correct",
        "well_formatted",
        "cut_off",
        "reasoning_tokens",
        "latent_steps",
        "gold_steps",
    ]
    assert frame["correct"].dtype == bool
    assert frame["reasoning_tokens"].dtype == "int64"
    assert pandas.isna(frame["gold_steps"][1])
    assert frame["gold_steps"][0] == 2
    assert pandas.isna(frame["extracted"][1])


def test_gold_steps_unknown_in_every_row_stay_null_integers(evaluation, tmp_path):
    without = Evaluation(evaluation.predictions[1:], [], 0.1)
    write_evaluation(tmp_path / "svamp", without)
    frame = pandas.read_parquet(tmp_path / "svamp" / "predictions.parquet")
    assert frame["gold_steps"].isna().all()
    by_steps = (tmp_path / "svamp" / "by_steps.csv").read_text()
    assert by_steps == "gold_steps,n,correct,accuracy,reasoning_tokens_mean\n"


def test_forced_csv_and_by_steps_csv_hold_fractions(evaluation, tmp_path):
    write_evaluation(tmp_path / "test", evaluation)
    forced = (tmp_path / "test" / "forced.csv").read_text()
    assert forced == "latent_steps,n,correct,accuracy\n0,2,0,0.0\n1,2,1,0.5\n"
    by_steps = (tmp_path / "test" / "by_steps.csv").read_text()
    assert by_steps == ("gold_steps,n,correct,accuracy,reasoning_tokens_mean\n2,1,1,1.0,3.0\n")


def test_the_summary_returned_is_the_one_written(evaluation, tmp_path):
    summary = write_evaluation(tmp_path / "test", evaluation)
    assert json.loads((tmp_path / "test" / "summary.json").read_text()) == summary
    assert (summary["n"], summary["correct"], summary["seconds"]) == (2, 1, 0.25)


def test_a_second_evaluation_replaces_the_first(evaluation, tmp_path):
    write_evaluation(tmp_path / "test", evaluation)
    (tmp_path / "test" / "stale.csv").touch()
    write_evaluation(tmp_path / "test", evaluation)
    assert not (tmp_path / "test" / "stale.csv").exists()
