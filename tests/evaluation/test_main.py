"""The command lines of the stage evaluation: in an experiment, and on any model folder."""

import json
import math

import pandas
import pytest

from latent_reasoning.config import ConfigError, resolve
from latent_reasoning.config import digest as digest_of
from latent_reasoning.dag.digests import science_digest
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.answers import Verdict
from latent_reasoning.data.rows import DataError, row_lines
from latent_reasoning.evaluation import evaluator
from latent_reasoning.evaluation.__main__ import main
from latent_reasoning.evaluation.folder import read_free_rows
from latent_reasoning.model.folder import write_model
from latent_reasoning.model.self_check import SelfCheckError
from latent_reasoning.model.tensors import CheckpointError
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.runtime.files import SUMS

TRAINING = {"steps": 1}
CONFIG = {
    "experiment": "small",
    "models": {
        "cot-sft": {"stage": "sft", "training": TRAINING},
        "latent-2": {"stage": "latent_sft", "training": TRAINING},
        "forced-2": {"stage": "latent_sft", "training": TRAINING, "forced_steps": 2},
    },
    "evaluation": {"max_new_tokens": 6, "max_forced_steps": 2, "forced_rows": 4},
    "tracking": {"enabled": False},
    "runtime": {"device": "cpu"},
}


@pytest.fixture
def data(tmp_path, rows):
    """Rows as a user has them: no ids."""
    path = tmp_path / "problems.jsonl"
    lines = [json.dumps({"question": row.question, "answer": row.answer}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def latent_folder(tmp_path, latent, tokenizer):
    return written(tmp_path / "latent", latent, tokenizer)


def written(folder, model, tokenizer):
    folder.mkdir(parents=True)
    write_model(model, tokenizer, folder)
    return folder


@pytest.fixture
def experiment(tmp_path, monkeypatch, rows, latent, tokenizer):
    """An experiment whose rows and latent models are there; returns the configuration file."""
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    layout = Layout.of(resolve(CONFIG, "config.yaml"))
    layout.data("test").parent.mkdir(parents=True)
    layout.data("test").write_text("".join(row_lines(rows)))
    for model in ("latent-2", "forced-2"):
        written(layout.model(model, 0), latent, tokenizer)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def evaluated(model):
    return Layout.of(resolve(CONFIG, "config.yaml")).evaluation(model, 0, "test")


def test_a_model_of_an_experiment_is_evaluated_where_the_workflow_expects_it(experiment, capsys):
    digest = science_digest(resolve(CONFIG, "config.yaml"), "evaluation", "latent-2")
    main(["--config", str(experiment), "--model", "latent-2", "--digest", digest])
    summary = json.loads((evaluated("latent-2") / "summary.json").read_text())
    assert digest_of(summary["science"]) == digest
    assert summary["n"] == 6
    predictions = pandas.read_parquet(evaluated("latent-2") / "predictions.parquet")
    assert list(predictions["id"]) == [f"test-{i}" for i in range(6)]
    assert math.isclose(predictions["correct"].mean(), summary["accuracy"])
    forced = pandas.read_csv(evaluated("latent-2") / "forced.csv")
    assert forced[["latent_steps", "n"]].to_numpy().tolist() == [[0, 4], [1, 4], [2, 4]]
    assert "latent-2, seed 0, on test" in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["exact", "public"])
def test_completions_are_judged_by_the_rule_of_the_experiment(experiment, monkeypatch, rule):
    rules = set()

    def judged(label, completion, thinking, rule):
        rules.add(rule)
        return Verdict(None, False, False)

    monkeypatch.setattr(evaluator, "judge", judged)
    experiment.write_text(json.dumps(CONFIG | {"data": {"number_rule": rule}}))
    main(["--config", str(experiment), "--model", "latent-2"])
    assert rules == {rule}


def test_rows_that_an_experiment_skips_are_counted_aloud(experiment, capsys):
    file = Layout.of(resolve(CONFIG, "config.yaml")).data("test")
    rows = file.read_text().splitlines()
    rows[0] = rows[0].replace("Where", "<START>")
    file.write_text("\n".join(rows))
    experiment.write_text(json.dumps(CONFIG | {"data": {"special_token_text": "skip"}}))
    main(["--config", str(experiment), "--model", "latent-2"])
    out = capsys.readouterr().out
    assert "test.jsonl: 1 rows with special-token text are skipped" in out
    assert "of 5; 95 % interval" in out
    file.write_text(rows[0])
    with pytest.raises(DataError, match=r"test\.jsonl: all 1 rows hold special-token text"):
        main(["--config", str(experiment), "--model", "latent-2"])


def test_a_model_with_forced_steps_is_evaluated_at_that_length(experiment):
    main(["--config", str(experiment), "--model", "forced-2", "--seed", "0"])
    predictions = pandas.read_parquet(evaluated("forced-2") / "predictions.parquet")
    assert set(predictions["reasoning_tokens"]) == {4}


@pytest.mark.parametrize(
    ("model", "option", "error", "message"),
    [
        ("latent-2", ["--digest", "0" * 16], ConfigError, "changed after the workflow started"),
        ("cot-sft", [], CheckpointError, "cot-sft/seed-0"),
        ("latent-2", ["--dataset", "svamp"], DataError, r"svamp\.jsonl"),
    ],
)
def test_another_configuration_and_what_is_not_there_are_refused(
    experiment, model, option, error, message
):
    with pytest.raises(error, match=message):
        main(["--config", str(experiment), "--model", model, *option])


def test_any_latent_folder_is_evaluated_without_an_experiment(latent_folder, data, capsys):
    options = ["--path", str(latent_folder), "--data", str(data), "--max-new-tokens", "6"]
    main([*options, "--device", "cpu", "--limit", "4", "--max-forced-steps", "1"])
    out = capsys.readouterr().out
    assert "of 4; 95 % interval" in out
    assert "forced to 1 latent steps" in out


def test_any_plain_folder_is_evaluated_and_written_where_asked(plain, tokenizer, data, tmp_path):
    folder = written(tmp_path / "plain", plain, tokenizer)
    options = [f"--path={folder}", f"--data={data}", "--max-new-tokens=6", "--device=cpu"]
    main([*options, f"--output={tmp_path / 'out'}", "--prompt-prefix="])
    predictions = pandas.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert list(predictions["id"]) == [f"problems-{i}" for i in range(6)]
    assert predictions["gold_steps"].isna().all()


def test_a_foreign_folder_is_tried_before_it_is_evaluated(plain, tokenizer, data, tmp_path):
    folder = written(tmp_path / "plain", plain, tokenizer)
    (folder / SUMS).unlink()
    arguments = ["--path", str(folder), "--data", str(data), "--max-new-tokens", "4"]
    main([*arguments, "--device", "cpu"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5}))
    with pytest.raises(SelfCheckError, match="LlamaForCausalLM fails the self-check: reading a"):
        main([*arguments, "--device", "cpu"])


def test_a_forced_length_makes_every_row_that_long(latent_folder, data, tmp_path):
    options = ["--path", str(latent_folder), "--data", str(data), "--max-new-tokens", "4"]
    main([*options, "--device", "cpu", "--forced-steps", "3", "--output", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["reasoning_tokens_min"], summary["reasoning_tokens_max"]) == (5, 5)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "Why?", "answer": "x"}', "line 1: the answer 'x' holds no number"),
        ("{", "problems.jsonl, line 1: not JSON"),
        ("", "no rows"),
    ],
)
def test_a_bad_file_of_rows_is_refused_with_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "problems.jsonl"
    path.write_text(line)
    with pytest.raises(DataError) as error:
        read_free_rows(path)
    assert reason in str(error.value)


def test_gsm8ks_own_rows_and_json_and_parquet_are_read(tmp_path):
    rows = [
        {"question": "How many?", "answer": "9-4=<<9-4=5>>5 pens are left.\n#### 5"},
        {"question": "And cups?", "answer": "#### 1,024"},
    ]
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "raw.parquet")
    for file in (path, tmp_path / "raw.parquet"):
        read = read_free_rows(file)
        assert [(row.id, row.answer) for row in read] == [("raw-0", "5"), ("raw-1", "1,024")]
    assert read_free_rows(path, limit=1) == read[:1]
    with pytest.raises(DataError, match=r"raw\.csv: rows are read from \.jsonl"):
        read_free_rows(tmp_path / "raw.csv")


def test_answers_that_are_no_plain_numbers_are_shown_or_by_choice_skipped(tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    answers = ["72 dollars", "-$5", "3,5"]
    path.write_text("\n".join(json.dumps({"question": "q?", "answer": a}) for a in answers))
    with pytest.raises(DataError, match=r"line 3: the answer '3,5' .*--on-bad-row skip leaves"):
        read_free_rows(path)
    rows = read_free_rows(path, on_bad_row="skip")
    assert [row.answer for row in rows] == ["72 dollars", "-$5"]
    shown = f"1 of 2 answers are not plain numbers; {path}, line 1: '72 dollars' read as 72"
    assert shown in capsys.readouterr().out
    assert len(read_free_rows(path, rule="public")) == 3
    assert "3 of 3 answers" not in capsys.readouterr().out  # `float` reads 3,5 without its comma


def test_special_token_text_in_a_question_is_refused_escaped_or_skipped(
    latent_folder, tmp_path, capsys
):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "What does <START> do?", "answer": "1"}\n')
    options = ["--path", str(latent_folder), "--data", str(path), "--max-new-tokens", "4"]
    with pytest.raises(DataError, match=r"problems-0.*<START>.*--special-token-text"):
        main(options)
    with pytest.raises(DataError, match="all 1 rows hold special-token text"):
        main([*options, "--special-token-text", "skip"])
    main([*options, "--special-token-text", "escape", "--output", str(tmp_path / "out")])
    (question,) = pandas.read_parquet(tmp_path / "out" / "predictions.parquet")["question"]
    assert question == "What does < START> do?"


def test_a_missing_model_folder_is_one_clear_line(tmp_path, data, capsys, monkeypatch):
    arguments = ["evaluation", "--path", str(tmp_path / "nowhere"), "--data", str(data)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit_status:
        run_stage(main)
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'}")


@pytest.mark.parametrize("option", [["--limit", "0"], ["--forced-steps", "-1"]])
def test_numbers_out_of_range_are_refused(data, option, capsys):
    with pytest.raises(SystemExit):
        main(["--path", ".", "--data", str(data), *option])
    assert "is below" in capsys.readouterr().err
