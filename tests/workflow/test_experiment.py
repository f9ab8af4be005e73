"""The real workflow on the test experiment: every rule runs, and a killed training resumes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
from functools import partial
from pathlib import Path

import pandas
import psutil
import pytest

from latent_reasoning.config import load
from tests.golden import golden
from tests.workflow.workflow_tools import (
    LONG,
    LONG_STEPS,
    TEST_CONFIG,
    logged_steps,
    long_trainings,
    running,
    snakemake,
    when_logged,
)

MAIN = ("cot-sft", "no-cot-sft", "latent-6", "latent-6-by-1", "latent-6-rl", "latent-6-by-1-rl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished test experiment, its appendix included."""
    folder = tmp_path_factory.mktemp("experiment")
    result = snakemake(folder, "--configfile", TEST_CONFIG, "--", "all", "appendix")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    return folder / "results" / "test"


def test_every_model_is_a_complete_folder_with_its_card(results):
    for model in (*MAIN, "meaned-codi"):
        model_folder = results / "models" / model / "seed-0"
        names = {file.name for file in model_folder.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
        assert ("latent.json" in names) == (not model.endswith("cot-sft"))
        card = json.loads((model_folder / "card.json").read_text(encoding="utf-8"))
        assert card["seed"] == 0


def test_every_model_is_evaluated_on_every_row_and_at_every_forced_length(results):
    for model in MAIN:
        folder = results / "evaluations" / model / "seed-0" / "test"
        predictions = pandas.read_parquet(folder / "predictions.parquet")
        assert list(predictions["id"]) == [f"test-{line}" for line in range(12)]
        assert set(predictions["gold_steps"]) <= {1, 2, 3}
        forced = pandas.read_csv(folder / "forced.csv")
        latent = not model.endswith("cot-sft")
        assert list(forced["latent_steps"]) == ([0, 1, 2, 3] if latent else [0])


def test_the_tables_have_a_row_a_model(results):
    for name, models in (("main", [*MAIN]), ("appendix", ["meaned-codi"])):
        assert list(pandas.read_csv(results / "tables" / f"{name}.csv")["model"]) == models


def test_every_number_is_the_recorded_one_to_the_bit(results):
    recorded = golden.read("test")
    if recorded["machine"] != golden.machine():
        pytest.skip(f"recorded with {recorded['machine']}, here {golden.machine()}: curves only")
    changed = golden.differences(recorded["sums"], golden.result_sums(results))
    golden.check_recipes(recorded, changed)
    assert not changed, "RECIPE was raised: record the new numbers with make golden"


def test_the_resolved_configuration_lies_beside_the_results(results):
    assert load(results / "config.yaml") == load(TEST_CONFIG)


def test_every_training_is_one_tracked_run_named_by_model_seed_and_stage(folder):
    with sqlite3.connect(folder / "results" / "mlflow.db") as store:
        names = {name for (name,) in store.execute("select name from runs")}
    assert {f"{model}/seed-0/sft" for model in ("cot-sft", "no-cot-sft")} <= names
    assert {f"{model}/seed-0/latent_sft" for model in ("latent-6", "latent-6-by-1")} <= names
    assert {f"{model}/seed-0/rl" for model in ("latent-6-rl", "latent-6-by-1-rl")} <= names


def test_a_second_run_has_nothing_to_do(folder):
    result = snakemake(folder, "--configfile", TEST_CONFIG, "--", "all", "appendix")
    assert result.returncode == 0
    assert "Nothing to be done" in result.stdout + result.stderr


def test_snakemakes_own_report_holds_the_figures(folder):
    report = folder / "report.html"
    result = snakemake(folder, "--configfile", TEST_CONFIG, "--report", report)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "accuracy_vs_tokens" in report.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------ kill and resume


def test_killed_trainings_resume_and_end_with_the_same_bits(folder, results):
    file, *targets = long_trainings(folder)
    arguments = ["--configfile", file, "--", *targets]
    weights = {name: results / "models" / name / "seed-0" / "model.safetensors" for name in LONG}
    checkpoints = {name: results / "checkpoints" / name / "seed-0" for name in LONG}

    result = snakemake(folder, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    uninterrupted = {name: file.read_bytes() for name, file in weights.items()}
    recorded = golden.read("curves")
    wrong = golden.curve_differences(recorded["curves"], golden.loss_curves(results))
    assert not wrong, f"recorded with {recorded['machine']}, run with {golden.machine()}: {wrong}"
    for name in LONG:
        shutil.rmtree(weights[name].parent)
        shutil.rmtree(checkpoints[name])

    with running(folder, "--cores=2", *arguments) as workflow:
        processes = psutil.Process(workflow.pid)
        killed_after = when_logged(workflow, checkpoints, 3, partial(_kill, processes))
        assert workflow.wait(timeout=120) != 0
    assert not any(file.exists() for file in weights.values())
    result = snakemake(folder, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, entry in LONG.items():
        assert 3 <= killed_after[name] < LONG_STEPS
        log = results / "logs" / entry["stage"] / name / "seed-0.log"
        assert f"{name}: resumes after step " in log.read_text(encoding="utf-8")
        steps = logged_steps(checkpoints[name])
        assert steps == sorted(steps)
        assert set(steps) == set(range(1, LONG_STEPS + 1))
        assert weights[name].read_bytes() == uninterrupted[name]


def _kill(workflow: psutil.Process, model: str) -> None:
    """Kill -9 the training of a model among a workflow's processes."""
    for process in workflow.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            if "-m" in command and model in command:
                os.kill(process.pid, signal.SIGKILL)
