"""MLflow: what was run, with which settings, and how it went.

One MLflow experiment a configuration, one run a (model, seed, stage). Metrics are collected and
sent in batches by a thread of their own, so that neither MLflow's import (seconds) nor a slow store
holds up training. Any failure is reported once on stderr and training goes on; what could not be
sent is tried again until the run is closed.

Runs are addressed by their id through `MlflowClient`: the environment's MLFLOW_RUN_ID, with which
the fluent interface would silently log into somebody else's run, plays no part.

    python -m latent_reasoning.runtime.tracking --config config/laptop.yaml

creates the store and the experiment, before parallel jobs need them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from latent_reasoning.config import PROJECT_ROOT, Experiment, dump, load
from latent_reasoning.runtime.command import parser, run_stage
from latent_reasoning.runtime.files import first_line, write_json

SECONDS_BETWEEN_BATCHES = 5.0
SECONDS_TO_CLOSE = 30.0
LONGEST_BATCH = 1000
LONGEST_PARAMETER = 6000
RUN_FILE = "mlflow.json"
SQLITE = "sqlite:///"


class Tracker(Protocol):
    """Where a stage reports to."""

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        """Settings of the run, nested mappings allowed; once a run."""

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Numbers at a step."""

    def log_artifact(self, path: Path) -> None:
        """A file to keep with the run."""

    def close(self, status: str = "FINISHED") -> None:
        """Send what is left; `status` is FINISHED, FAILED or KILLED (ended early)."""


class NullTracker:
    """Tracks nothing: for tests, and where tracking is off."""

    def log_parameters(self, parameters: dict[str, Any]) -> None: ...

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def close(self, status: str = "FINISHED") -> None: ...


@dataclass(frozen=True)
class RunIdentity:
    """Which run this is. `digest` is that of the model's settings; a parent is a folder of
    checkpoints, where the parent's run id was written down."""

    experiment: str
    model: str
    seed: int
    stage: str
    digest: str
    parent: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.model}/seed-{self.seed}/{self.stage}"


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
    """The tracker of one run; a `NullTracker` where the configuration turns tracking off.

    `checkpoints` is the folder in which the run's id is kept, so that a resumed training goes on in
    the same run; `parent` is the folder of checkpoints of the model it starts from.
    """
    if not experiment.tracking.enabled:
        return NullTracker()
    identity = RunIdentity(experiment.experiment, model, seed, stage, digest, parent)
    tracker = MlflowTracker(store_uri(experiment.tracking.uri), identity, checkpoints)
    tracker.log_parameters(dump(experiment)["models"].get(model, {}))
    return tracker


def store_uri(configured: str) -> str:
    """The store: MLFLOW_TRACKING_URI goes first; a relative sqlite path starts at the project."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or configured
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        return SQLITE + str(PROJECT_ROOT / uri.removeprefix(SQLITE))
    return uri


class MlflowTracker:
    """Sends everything to one MLflow run, from a background thread."""

    def __init__(self, uri: str, identity: RunIdentity, checkpoints: Path | None = None) -> None:
        self._store = _RunStore(uri, identity, checkpoints)
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._pending: list[tuple[str, Any]] = []
        self._warned = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        self._queue.put(("parameters", flatten(parameters)))

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        self._queue.put(("metrics", [(name, float(v), now, step) for name, v in values.items()]))

    def log_artifact(self, path: Path) -> None:
        self._queue.put(("artifact", Path(path)))

    def close(self, status: str = "FINISHED") -> None:
        if self._closing.is_set():
            return
        self._queue.put(("end", status))
        self._closing.set()
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            self._warn(f"the store did not answer within {SECONDS_TO_CLOSE:.0f} seconds")

    def _work(self) -> None:
        """Send in batches until closed; what fails is kept and tried with the next batch."""
        wait = 0.0
        while True:
            closing = self._closing.wait(wait)
            while not self._queue.empty():
                self._pending.append(self._queue.get())
            try:
                self._send()
                wait = SECONDS_BETWEEN_BATCHES
            except Exception as error:
                self._warn(f"{type(error).__name__}: {error}")
                # A store that is away is asked ever more rarely: each question takes time.
                wait = min(300.0, max(SECONDS_BETWEEN_BATCHES, 2 * wait))
            if closing and self._queue.empty():
                return

    def _send(self) -> None:
        while self._pending:
            kind, content = self._pending[0]
            if kind == "metrics":
                batch, count = _batch_of(self._pending)
                self._store.send_metrics(batch)
                del self._pending[:count]
                continue
            {
                "parameters": self._store.send_parameters,
                "artifact": self._store.send_artifact,
                "end": self._store.end,
            }[kind](content)
            del self._pending[0]

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"warning: MLflow cannot be reached, work goes on without it: {first_line(reason)}",
                file=sys.stderr,
                flush=True,
            )


@dataclass
class _RunStore:
    """One run in an MLflow store; connects at first use."""

    uri: str
    identity: RunIdentity
    checkpoints: Path | None
    _client: Any = None
    _run_id: str | None = field(default=None)

    def send_parameters(self, parameters: dict[str, str]) -> None:
        client, run_id = self._connected()
        from mlflow.entities import Param

        # A resumed run has its parameters already; MLflow accepts equal ones again.
        entries = [Param(name, value) for name, value in parameters.items()]
        for start in range(0, len(entries), 100):
            client.log_batch(run_id, params=entries[start : start + 100])

    def send_metrics(self, values: list[tuple[str, float, int, int]]) -> None:
        client, run_id = self._connected()
        from mlflow.entities import Metric

        client.log_batch(run_id, metrics=[Metric(*value) for value in values])

    def send_artifact(self, path: Path) -> None:
        client, run_id = self._connected()
        client.log_artifact(run_id, str(path))

    def end(self, status: str) -> None:
        client, run_id = self._connected()
        client.set_terminated(run_id, status)

    def _connected(self) -> tuple[Any, str]:
        if self._run_id is None:
            self._client = connect(self.uri)
            self._run_id = self._reattached() or self._created()
        return self._client, self._run_id

    def _reattached(self) -> str | None:
        """The run that an earlier part of this training logged to, set running again."""
        known = _read_run(self.checkpoints)
        if known is None or (known["uri"], known["digest"]) != (self.uri, self.identity.digest):
            return None
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(known["run_id"], status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return known["run_id"]

    def _created(self) -> str:
        identity = self.identity
        parent = _read_run(identity.parent)
        tags = {
            "git_commit": git_commit(),
            "config_digest": identity.digest,
            "parent_run_id": parent["run_id"] if parent else "",
            "model": identity.model,
            "seed": str(identity.seed),
            "stage": identity.stage,
        }
        experiment_id = create_experiment(self._client, self.uri, identity.experiment)
        run = self._client.create_run(experiment_id, run_name=identity.name, tags=tags)
        if self.checkpoints is not None:
            write_json(
                self.checkpoints / RUN_FILE,
                {"run_id": run.info.run_id, "uri": self.uri, "digest": identity.digest},
            )
        return run.info.run_id


def connect(uri: str) -> Any:
    """An MLflow client; imports MLflow, which takes seconds, and creates a sqlite store."""
    # Fail soon where nobody answers, and report nothing to anybody.
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
    # Two jobs that create the same tables at the same time would both fail.
    with database.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def create_experiment(client: Any, uri: str, name: str) -> str:
    """The id of the experiment `name`, created where it is missing; several jobs may try."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_folder(uri))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def flatten(parameters: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.key` and text, the form in which MLflow keeps them."""
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[prefix + name] = text[:LONGEST_PARAMETER]
    return flat


def git_commit() -> str:
    """The checked-out commit, or `unknown` outside a git repository."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=PROJECT_ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def _batch_of(pending: list[tuple[str, Any]]) -> tuple[list[tuple[str, float, int, int]], int]:
    """The metrics at the head of the queue, at most as many as MLflow takes at once."""
    batch: list[tuple[str, float, int, int]] = []
    count = 0
    for kind, content in pending:
        if kind != "metrics" or (batch and len(batch) + len(content) > LONGEST_BATCH):
            break
        batch += content
        count += 1
    return batch, count


def _artifact_folder(uri: str) -> str | None:
    """Artifacts of a sqlite store lie beside it; a server knows its own place."""
    if not uri.startswith(SQLITE):
        return None
    return (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()


def _read_run(folder: Path | None) -> dict[str, str] | None:
    if folder is None:
        return None
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return {key: str(content[key]) for key in ("run_id", "uri", "digest")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main(arguments: list[str] | None = None) -> None:
    """Create the store and the experiment of a configuration."""
    options = parser(__doc__.splitlines()[0]).parse_args(arguments)
    experiment = load(options.config)
    if not experiment.tracking.enabled:
        return
    uri = store_uri(experiment.tracking.uri)
    try:
        create_experiment(connect(uri), uri, experiment.experiment)
    except Exception as error:
        print(f"warning: MLflow cannot be reached, work goes on without it: {error}")


if __name__ == "__main__":
    run_stage(main)
