"""MLflow tracking: what is logged where, and that no failure stops the work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.runtime import tracking
from latent_reasoning.runtime.tracking import (
    MlflowTracker,
    NullTracker,
    RunIdentity,
    connect,
    flatten,
    open_tracker,
    store_uri,
)

pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """One store for the whole module: creating its tables takes seconds."""
    address = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    tracking.create_experiment(connect(address), address, "laptop")
    return address


def identity(model: str, **changes) -> RunIdentity:
    values = {"experiment": "laptop", "model": model, "seed": 0, "stage": "sft", "digest": "d1"}
    return RunIdentity(**(values | changes))


def runs(uri: str, model: str) -> list:
    client = connect(uri)
    experiment = client.get_experiment_by_name("laptop")
    return client.search_runs([experiment.experiment_id], f"tags.model = '{model}'")


def test_a_run_holds_name_tags_parameters_metrics_and_artifacts(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "somebody-elses-run")
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "mlflow.json").write_text(
        json.dumps({"run_id": "the-parent", "uri": uri, "digest": "x"})
    )
    table = tmp_path / "table.csv"
    table.write_text("a\n")
    tracker = MlflowTracker(uri, identity("cot-sft", parent=parent), tmp_path)
    tracker.log_parameters({"training": {"steps": 3}, "lora": None})
    tracker.log_metrics({"loss": 2.0, "validation_accuracy": 0.5}, 1)
    tracker.log_metrics({"loss": 1.0}, 2)
    tracker.log_artifact(table)
    tracker.close()
    (run,) = runs(uri, "cot-sft")
    assert run.info.run_name == "cot-sft/seed-0/sft"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"training.steps": "3", "lora": "null"}
    assert run.data.tags["config_digest"] == "d1"
    assert run.data.tags["parent_run_id"] == "the-parent"
    assert "git_commit" in run.data.tags
    history = connect(uri).get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0)]
    assert [a.path for a in connect(uri).list_artifacts(run.info.run_id)] == ["table.csv"]


def test_a_resumed_training_goes_on_in_its_run_and_another_configuration_does_not(uri, tmp_path):
    for digest, step in (("d1", 1), ("d1", 2), ("d2", 3)):
        tracker = MlflowTracker(uri, identity("latent-6", digest=digest), tmp_path)
        tracker.log_metrics({"loss": float(step)}, step)
        tracker.close("FAILED" if step == 1 else "FINISHED")
    first, second = sorted(runs(uri, "latent-6"), key=lambda run: run.info.start_time)
    history = connect(uri).get_metric_history(first.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2]
    assert first.info.status == "FINISHED"
    assert second.data.tags["config_digest"] == "d2"


JOB = """
import sys
from pathlib import Path
from latent_reasoning.runtime.tracking import MlflowTracker, RunIdentity
uri, model, folder = sys.argv[1:]
tracker = MlflowTracker(uri, RunIdentity("laptop", model, 0, "sft", "d1"), Path(folder))
for step in range(300):
    tracker.log_metrics({"loss": float(step)}, step)
tracker.close()
"""


def test_two_jobs_log_at_once(uri, tmp_path):
    jobs = []
    for model in ("job-a", "job-b"):
        (tmp_path / model).mkdir()
        command = [sys.executable, "-c", JOB, uri, model, str(tmp_path / model)]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0
        assert "warning" not in errors
    for model in ("job-a", "job-b"):
        (run,) = runs(uri, model)
        assert len(connect(uri).get_metric_history(run.info.run_id, "loss")) == 300


def test_an_unreachable_store_is_reported_once_and_work_goes_on(capfd, tmp_path):
    start = time.monotonic()
    tracker = MlflowTracker("http://127.0.0.1:9", identity("x"), tmp_path)
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - start < 1.0, "logging does not wait for the store"
    tracker.close()
    errors = capfd.readouterr().err
    assert errors.count("warning: MLflow cannot be reached, work goes on without it") == 1


def test_what_could_not_be_sent_is_sent_later(uri, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_BATCHES", 0.01)
    original = tracking._RunStore.send_metrics
    failures = iter([OSError("locked"), OSError("locked")])

    def unreliable(self, values):
        for error in failures:
            raise error
        original(self, values)

    monkeypatch.setattr(tracking._RunStore, "send_metrics", unreliable)
    tracker = MlflowTracker(uri, identity("flaky"), tmp_path)
    tracker.log_metrics({"loss": 7.0}, 4)
    deadline = time.monotonic() + 30
    while next(failures, None) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    tracker.close()
    (run,) = runs(uri, "flaky")
    assert run.data.metrics == {"loss": 7.0}
    assert capfd.readouterr().err.count("warning") == 1


def test_the_environments_store_goes_first_and_a_relative_sqlite_path_starts_at_the_project(
    monkeypatch,
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri("sqlite:///results/mlflow.db") == f"sqlite:///{PROJECT_ROOT}/results/mlflow.db"
    assert store_uri("sqlite:////var/mlflow.db") == "sqlite:////var/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert store_uri("sqlite:///results/mlflow.db") == "http://127.0.0.1:5000"


def test_settings_are_flattened_to_text():
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": "text", "f": {}}) == {
        "a.b": "1",
        "a.c.d": "[1, 2]",
        "e": "text",
        "f": "{}",
    }


def test_tracking_can_be_turned_off(tmp_path: Path):
    class Off:
        class tracking:  # noqa: N801
            enabled = False

    tracker = open_tracker(Off, model="m", seed=0, stage="sft", digest="d")
    assert isinstance(tracker, NullTracker)
