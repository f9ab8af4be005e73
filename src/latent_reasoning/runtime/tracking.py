"""MLflow: what was run, with which settings, and how it went.

A configuration is one MLflow experiment, a (model, seed, stage) one run. A thread of its own sends
what was logged every few seconds, so that neither MLflow's import (seconds) nor a slow store holds
up training. A failure is reported once on stderr; what was not sent is kept and tried again until
the run is closed. MLflow's asynchronous logging is not used: it drops a batch that fails, needs the
store when a run is opened, and waits for it without limit when the process ends.

Runs are addressed by their id through `MlflowClient`: the fluent interface would silently log into
the run that MLFLOW_RUN_ID in the environment names, perhaps somebody else's.

    python -m latent_reasoning.runtime.tracking --config config/laptop.yaml

creates the store and the experiment before parallel jobs need them. Without `--config` it prints
the page of each experiment's runs, for `make ui`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from latent_reasoning.config import PROJECT_ROOT, Experiment, Tracking, UserError, dump, load
from latent_reasoning.runtime.command import TRACKING_THREAD, run_stage
from latent_reasoning.runtime.files import first_line, write_json

SECONDS_BETWEEN_BATCHES = 5.0
SECONDS_AFTER_FAILURE = 60.0
SECONDS_TO_CLOSE = 60.0
LONGEST_BATCH, MOST_PARAMETERS = 1000, 100
"""Metrics and parameters that MLflow takes at once."""
RUN_FILE = "mlflow.json"
SQLITE = "sqlite:///"
KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"
"""The tag by which MLflow's pages show an experiment's training runs, and not traces."""
DELETED = "deleted"
"""The stage of life of what was deleted on MLflow's pages; it stays in the store for a while."""
PAGE = "/#/experiments/{}/runs?workflowType=machine_learning"
"""An experiment's runs; MLflow 3 shows traces there unless the address asks for training."""


class Tracker:
    """What a stage reports its progress to; this one keeps nothing."""

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log numbers at a step."""

    def log_artifact(self, path: Path) -> None:
        """Keep a file with the run."""

    def close(self, status: str = "FINISHED") -> None:
        """Send what is left; `status` is FINISHED, FAILED or KILLED (ended early)."""


def open_tracker(
    experiment: Experiment,
    *,
    model: str,
    seed: int,
    stage: str,
    digest: str,
    checkpoints: Path | None = None,
    parent: Path | None = None,
) -> Tracker:
    """The tracker of one run; one that keeps nothing if tracking is off.

    `digest` is that of the model's settings. `checkpoints` is the folder in which the run's id is
    kept, so that a resumed training continues the same run; `parent` is the folder of checkpoints
    of the model it starts from.
    """
    if not experiment.tracking.enabled:
        return Tracker()
    tags = {
        "git_commit": git_commit(),
        "config_digest": digest,
        "parent_run_id": _read_run(parent).get("run_id", ""),
        "model": model,
        "seed": str(seed),
        "stage": stage,
    }
    return MlflowTracker(
        store_uri(experiment.tracking.uri),
        experiment.experiment,
        tags,
        parameters=flatten(dump(experiment)["models"].get(model, {})),
        checkpoints=checkpoints,
    )


def store_uri(configured: str) -> str:
    """The store; MLFLOW_TRACKING_URI takes precedence. Relative sqlite paths start at the
    project."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return SQLITE + str(PROJECT_ROOT / uri.removeprefix(SQLITE))
    return uri


class MlflowTracker(Tracker):
    """Sends everything to one MLflow run, from a background thread."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        tags: dict[str, str],
        parameters: dict[str, str] | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        self._uri, self._experiment, self._tags = uri, experiment, tags
        self._parameters, self._checkpoints = parameters or {}, checkpoints
        self._client: Any = None
        self._run_id = ""
        self._metrics: list[tuple[str, float, int, int]] = []
        self._artifacts: list[Path] = []
        self._status = ""
        self._warned = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=TRACKING_THREAD, daemon=True)
        self._thread.start()

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        self._metrics += [(name, float(value), now, step) for name, value in values.items()]

    def log_artifact(self, path: Path) -> None:
        self._artifacts.append(path)

    def close(self, status: str = "FINISHED") -> None:
        if self._closing.is_set():
            return
        self._status = status
        self._closing.set()
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._warn(f"the store did not answer within {SECONDS_TO_CLOSE:.0f} seconds")

    def _work(self) -> None:
        """Send every few seconds until closed; what fails is kept for the next time."""
        wait, closing = 0.0, False
        while not closing:
            closing = self._closing.wait(wait)
            try:
                self._send(closing)
                wait = SECONDS_BETWEEN_BATCHES
            except Exception as error:
                self._warn(f"{type(error).__name__}: {error}")
                wait = SECONDS_AFTER_FAILURE

    def _send(self, closing: bool) -> None:
        if not self._run_id:
            self._client = connect(self._uri)
            self._run_id = self._reattached() or self._created()
        from mlflow.entities import Metric

        while batch := self._metrics[:LONGEST_BATCH]:
            self._client.log_batch(self._run_id, metrics=[Metric(*value) for value in batch])
            del self._metrics[: len(batch)]
        if closing:
            for path in self._artifacts:
                self._client.log_artifact(self._run_id, str(path))
            self._client.set_terminated(self._run_id, self._status)

    def _reattached(self) -> str:
        """The run that an earlier part of this training logged to, set running again."""
        known = _read_run(self._checkpoints)
        if (known.get("uri"), known.get("digest")) != (self._uri, self._tags["config_digest"]):
            return ""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(known["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""
        if run.info.lifecycle_stage == DELETED:
            return ""
        self._client.update_run(known["run_id"], status="RUNNING")
        return known["run_id"]

    def _created(self) -> str:
        """A new run with its tags and parameters; its id is noted beside the checkpoints."""
        tags = self._tags
        experiment_id = create_experiment(self._client, self._uri, self._experiment)
        name = f"{tags['model']}/seed-{tags['seed']}/{tags['stage']}"
        run_id = self._client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
        from mlflow.entities import Param

        parameters = [Param(key, value) for key, value in self._parameters.items()]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            batch = parameters[start : start + MOST_PARAMETERS]
            self._client.log_batch(run_id, params=batch)
        if self._checkpoints is not None:
            note = {"run_id": run_id, "uri": self._uri, "digest": tags["config_digest"]}
            write_json(self._checkpoints / RUN_FILE, note)
        return run_id

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            print(unreachable(reason), file=sys.stderr, flush=True)


def unreachable(reason: str) -> str:
    """The warning about a store that fails, in one line."""
    return f"warning: MLflow cannot be reached, work continues without it: {first_line(reason)}"


def connect(uri: str) -> Any:
    """An MLflow client; imports MLflow, which takes seconds, and creates a sqlite store."""
    # Fail soon if there is no answer, and send no telemetry.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    # Its own report of a failing store is a traceback; ours is one line.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    if not uri.startswith(SQLITE):
        return MlflowClient(tracking_uri=uri)
    database = Path(uri.removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    # The client creates the tables: two jobs that did so at the same time would both fail.
    with database.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return MlflowClient(tracking_uri=uri)


def create_experiment(client: Any, uri: str, name: str) -> str:
    """The id of the experiment `name`, created if it is missing; several jobs may try.

    One that was deleted is restored, for MLflow keeps its name and logs nothing to it. Artifacts of
    a sqlite store lie beside it; a server knows its own place.
    """
    from mlflow.exceptions import MlflowException

    beside = Path(uri.removeprefix(SQLITE)).parent / "mlartifacts"
    location = beside.as_uri() if uri.startswith(SQLITE) else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, location, tags={KIND: TRAINING})
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == DELETED:
        client.restore_experiment(found.experiment_id)
    if found.tags.get(KIND) != TRAINING:
        client.set_experiment_tag(found.experiment_id, KIND, TRAINING)
    return found.experiment_id


def pages(uri: str, server: str = "http://127.0.0.1:5000") -> dict[str, str]:
    """The address of the page of each experiment's runs, the latest experiment first.

    Raises `UserError` if the store cannot be read.
    """
    try:
        experiments = connect(uri).search_experiments(order_by=["last_update_time DESC"])
    except Exception as error:  # MLflow's, and those of what it stands on
        raise UserError(f"the tracking store cannot be read: {first_line(error)}") from error
    base = uri if uri.startswith("http") else server
    return {e.name: base + PAGE.format(e.experiment_id) for e in experiments if e.name != "Default"}


def flatten(parameters: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.key` and text, the form in which MLflow keeps them."""
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[prefix + name] = text
    return flat


def git_commit() -> str:
    """The checked-out commit, or `unknown` outside a git repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(
            command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def _read_run(folder: Path | None) -> dict[str, str]:
    """What a run noted beside its checkpoints: run_id, uri and digest; empty if there is none."""
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")) if folder else {}
        return {key: str(content[key]) for key in ("run_id", "uri", "digest")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main(arguments: list[str] | None = None) -> None:
    """Create the store and the experiment of a configuration, or print the runs' pages."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--config", nargs="+", metavar="FILE", help="a later file overrides")
    files = options.parse_args(arguments).config
    if not files:
        for name, page in pages(store_uri(Tracking().uri)).items():
            print(f"{name:20} {page}")
        return
    experiment = load(files)
    if not experiment.tracking.enabled:
        return
    uri = store_uri(experiment.tracking.uri)
    try:
        create_experiment(connect(uri), uri, experiment.experiment)
    except Exception as error:
        print(unreachable(str(error)))


if __name__ == "__main__":
    run_stage(main)
