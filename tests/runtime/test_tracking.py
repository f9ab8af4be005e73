"""MLflow tracking: what is logged where, and that no failure stops the work."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from latent_reasoning.config import PROJECT_ROOT, UserError, load
from latent_reasoning.runtime import tracking
from latent_reasoning.runtime.tracking import (
    MlflowTracker,
    Tracker,
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


def tags(model: str, **changes: str) -> dict[str, str]:
    return {"model": model, "seed": "0", "stage": "sft", "config_digest": "d1"} | changes


def runs(uri: str, model: str) -> list:
    client = connect(uri)
    experiment = client.get_experiment_by_name("laptop")
    return client.search_runs([experiment.experiment_id], f"tags.model = '{model}'")


def test_a_run_holds_name_tags_parameters_metrics_and_artifacts(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "somebody-elses-run")
    table = tmp_path / "table.csv"
    table.write_text("a\n")
    parameters = {"training.steps": "3", "lora": "null"}
    tracker = MlflowTracker(uri, "laptop", tags("cot-sft"), parameters, tmp_path)
    tracker.log_metrics({"loss": 2.0, "validation_accuracy": 0.5}, 1)
    tracker.log_metrics({"loss": 1.0}, 2)
    tracker.log_artifact(table)
    tracker.close()
    (run,) = runs(uri, "cot-sft")
    assert run.info.run_name == "cot-sft/seed-0/sft"
    assert run.info.status == "FINISHED"
    assert run.data.params == parameters
    assert run.data.tags.items() >= tags("cot-sft").items()
    history = connect(uri).get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0)]
    assert [a.path for a in connect(uri).list_artifacts(run.info.run_id)] == ["table.csv"]


def test_a_stages_run_says_where_it_comes_from(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    note = {"run_id": "the-parent", "uri": uri, "digest": "x"}
    (tmp_path / "mlflow.json").write_text(json.dumps(note))
    experiment = load(PROJECT_ROOT / "config" / "test.yaml")
    experiment.experiment = "laptop"
    which = {"model": "latent-6-rl", "seed": 0, "stage": "rl", "digest": "d7"}
    open_tracker(experiment, **which, parent=tmp_path).close("KILLED")
    (run,) = runs(uri, "latent-6-rl")
    assert run.info.status == "KILLED"
    assert run.data.tags["config_digest"] == "d7"
    assert run.data.tags["parent_run_id"] == "the-parent"
    assert len(run.data.tags["git_commit"]) >= len("unknown")
    assert run.data.params["stage"] == "rl"
    experiment.tracking.enabled = False
    assert type(open_tracker(experiment, **which)) is Tracker


def test_a_resumed_training_continues_its_run_and_another_configuration_does_not(uri, tmp_path):
    for digest, step in (("d1", 1), ("d1", 2), ("d2", 3)):
        which = tags("latent-6", config_digest=digest)
        # A setting that is no science may change before a training is resumed.
        tracker = MlflowTracker(uri, "laptop", which, {"save": str(step)}, tmp_path)
        tracker.log_metrics({"loss": float(step)}, step)
        tracker.close("FAILED" if step == 1 else "FINISHED")
    first, second = sorted(runs(uri, "latent-6"), key=lambda run: run.info.start_time)
    history = connect(uri).get_metric_history(first.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2]
    assert first.info.status == "FINISHED"
    assert second.data.tags["config_digest"] == "d2"


JOB = """
import sys
from latent_reasoning.runtime import tracking
uri, model = sys.argv[1:]
tags = {"model": model, "seed": "0", "stage": "sft", "config_digest": "d1"}
tracking.SECONDS_TO_CLOSE = 110  # a busy machine takes its time to make the tables
tracker = tracking.MlflowTracker(uri, "laptop", tags)
for step in range(2500):
    tracker.log_metrics({"loss": float(step)}, step)
tracker.close()
"""


def test_what_was_deleted_on_mlflows_pages_holds_up_no_run(tmp_path, capfd):
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def steps() -> list[int]:
        tracker = MlflowTracker(address, "laptop", tags("sft"), checkpoints=tmp_path)
        tracker.log_metrics({"loss": 1.0}, len(ids) + 1)
        tracker.close()
        ids.append(json.loads((tmp_path / "mlflow.json").read_text())["run_id"])
        return [metric.step for metric in client.get_metric_history(ids[-1], "loss")]

    ids: list[str] = []
    client = connect(address)
    assert steps() == [1]
    client.delete_run(ids[-1])
    assert steps() == [2]
    client.delete_experiment(client.get_experiment_by_name("laptop").experiment_id)
    assert steps() == [3]
    assert len(set(ids)) == 3
    assert "warning" not in capfd.readouterr().err


def test_a_store_that_cannot_be_read_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "mlflow.db").write_text("not a database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match=r"the tracking store cannot be read: .*not a database"):
        tracking.main([])


def test_two_jobs_that_use_a_new_store_at_once_log_everything(tmp_path):
    new = f"sqlite:///{tmp_path}/new/mlflow.db"
    commands = [[sys.executable, "-c", JOB, new, model] for model in ("job-a", "job-b")]
    jobs = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0
        assert "warning" not in errors
    for model in ("job-a", "job-b"):
        (run,) = runs(new, model)
        assert len(connect(new).get_metric_history(run.info.run_id, "loss")) == 2500


def test_an_unreachable_store_is_reported_once_and_holds_up_nothing(capfd):
    start = time.monotonic()
    tracker = MlflowTracker("http://127.0.0.1:9", "laptop", tags("x"))
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - start < 1.0, "logging does not wait for the store"
    tracker.close()
    errors = capfd.readouterr().err
    assert errors.count("warning: MLflow cannot be reached, work continues without it") == 1


def test_what_could_not_be_sent_is_sent_later(uri, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "SECONDS_AFTER_FAILURE", 0.01)
    failures = iter([OSError("locked"), OSError("locked")])

    def unreliable(address):
        for error in failures:
            raise error
        return connect(address)

    monkeypatch.setattr(tracking, "connect", unreliable)
    tracker = MlflowTracker(uri, "laptop", tags("flaky"))
    tracker.log_metrics({"loss": 7.0}, 4)
    deadline = time.monotonic() + 30
    while not runs(uri, "flaky") and time.monotonic() < deadline:
        time.sleep(0.02)
    tracker.close()
    (run,) = runs(uri, "flaky")
    assert run.data.metrics == {"loss": 7.0}
    assert capfd.readouterr().err.count("warning") == 1


def test_the_runs_pages_show_trainings_also_of_an_older_experiment(tmp_path, monkeypatch, capsys):
    store = f"sqlite:///{tmp_path / 'old.db'}"
    number = connect(store).create_experiment("older")
    assert tracking.create_experiment(connect(store), store, "older") == number
    kind = connect(store).get_experiment(number).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tracking.main([])
    page = f"http://127.0.0.1:5000/#/experiments/{number}/runs?workflowType=machine_learning"
    assert capsys.readouterr().out.split() == ["older", page]


def test_the_environments_store_takes_precedence_and_a_relative_path_starts_at_the_project(
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
