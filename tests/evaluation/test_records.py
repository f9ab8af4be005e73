"""The files of an evaluation have the names, columns and types of the contract."""

import json
from dataclasses import replace

import pandas
import pytest

from latent_reasoning.evaluation.records import (
    Evaluation,
    ForcedPoint,
    Prediction,
    write_evaluation,
)

RIGHT = Prediction(
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
BAD = replace(
    RIGHT,
    id="test-1",
    completion="<|CONTINUE|><|CONTINUE|>",
    extracted=None,
    correct=False,
    well_formatted=False,
    cut_off=True,
    latent_steps=2,
    gold_steps=None,
)


@pytest.fixture
def evaluation():
    return Evaluation([RIGHT, BAD], [ForcedPoint(0, 2, 0), ForcedPoint(1, 2, 1)], seconds=0.25)


def test_an_evaluation_is_four_files_and_replaces_one_before(evaluation, tmp_path):
    folder = tmp_path / "test"
    for _ in range(2):
        summary = write_evaluation(folder, evaluation)
        assert {path.name for path in folder.iterdir()} == {
            *("summary.json", "predictions.parquet", "forced.csv", "by_steps.csv", "SHA256SUMS")
        }
        (folder / "stale.csv").touch()
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["n"], summary["correct"], summary["seconds"]) == (2, 1, 0.25)


def test_predictions_keep_their_columns_types_and_nulls(evaluation, tmp_path):
    write_evaluation(tmp_path / "test", evaluation)
    frame = pandas.read_parquet(tmp_path / "test" / "predictions.parquet")
    assert list(frame.columns) == [
        *("id", "question", "answer", "completion", "extracted", "correct", "well_formatted"),
        *("cut_off", "reasoning_tokens", "latent_steps", "gold_steps"),
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
