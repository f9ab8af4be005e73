"""Running and planning the workflow in a folder of its own, with real stages or stand-ins."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from latent_reasoning.config import PROJECT_ROOT

STAND_IN = Path(__file__).with_name("stand_in_stage.py")
TARGETS = ("all", "appendix")
PROFILE = PROJECT_ROOT / "workflow" / "profiles" / "default"
TEST_CONFIG = PROJECT_ROOT / "config" / "test.yaml"
LONG = {
    "long-latent": {"stage": "latent_sft", "from": "base"},
    "long-rl": {"stage": "rl", "from": "latent-6"},
}
"""Models that train for `LONG_STEPS`, beside those of the test experiment."""

LONG_STEPS = 40


def snakemake(
    folder: Path, *arguments: str | Path, snakefile: Path = PROJECT_ROOT / "Snakefile"
) -> subprocess.CompletedProcess[str]:
    """Run the command line in `folder`, with the results below it."""
    command = ["-m", "snakemake", "--cores", "2", "--snakefile", snakefile]
    command += ["--workflow-profile", PROFILE, *arguments]
    return run(command, folder, environment(folder))


@contextlib.contextmanager
def running(
    folder: Path,
    *arguments: str | Path,
    profile: Path = PROFILE,
    variables: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Snakemake at work in `folder`, a process group with its words in `folder/output`.

    It is ended where it still runs at the end, because something failed.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", PROJECT_ROOT / "Snakefile"]
    command += ["--workflow-profile", profile, *arguments]
    with (folder / "output").open("wb") as output:
        workflow = subprocess.Popen(
            [str(part) for part in command],
            env=environment(folder) | (variables or {}),
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield workflow
    finally:
        if workflow.poll() is None:
            os.killpg(workflow.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                workflow.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(workflow.pid, signal.SIGKILL)
            workflow.wait()


def when_logged(
    workflow: subprocess.Popen[bytes],
    checkpoints: dict[str, Path],
    steps: int,
    act: Callable[[str], None],
) -> dict[str, int]:
    """`act` on each training, by name, once it logged some steps; returns how many by then.

    `checkpoints` are the folders of the trainings' checkpoints.
    """
    after: dict[str, int] = {}
    deadline = time.monotonic() + 600
    while len(after) < len(checkpoints):
        assert workflow.poll() is None, f"ended before all had made their steps: {after}"
        assert time.monotonic() < deadline, f"no steps within ten minutes: {after}"
        for name in set(checkpoints) - set(after):
            if len(logged_steps(checkpoints[name])) >= steps:
                act(name)
                after[name] = len(logged_steps(checkpoints[name]))
        time.sleep(0.005)
    return after


def logged_steps(checkpoints: Path) -> list[int]:
    """The steps in a training's metrics so far, whole lines alone."""
    metrics = checkpoints / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines]


def run(
    arguments: list[str | Path], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run this Python with `arguments` in `folder`."""
    return subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,
    )


def environment(folder: Path) -> dict[str, str]:
    """The environment of a workflow whose results and tracking store lie in `folder/results`."""
    return {
        **os.environ,
        "LATENT_REASONING_RESULTS": str(folder / "results"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/results/mlflow.db",
        "NO_COLOR": "1",
    }


def long_trainings(folder: Path) -> tuple[Path | str, ...]:
    """The test experiment with the models `LONG`, as a file in `folder`, and these targets."""
    config = yaml.safe_load(TEST_CONFIG.read_text(encoding="utf-8"))
    training = {"steps": LONG_STEPS, "validate_every": LONG_STEPS}
    config["models"] |= {name: {**entry, "training": training} for name, entry in LONG.items()}
    file = folder / "long.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file, *(f"results/test/models/{name}/seed-0" for name in LONG)


def with_stand_ins(folder: Path, project: Path = PROJECT_ROOT) -> Path:
    """A Snakefile that is the project's own, but for the program that its jobs run."""
    program = folder / "bin" / "python"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    snakefile = folder / "Snakefile"
    prefix = f'export PATH={program.parent}:"$PATH"; '
    snakefile.write_text(
        f'include: "{project / "Snakefile"}"\n\n\nshell.prefix({prefix!r})\n',
        encoding="utf-8",
    )
    return snakefile


def plan(folder: Path, *configs: Path, targets: tuple[str, ...] = ()) -> set[str]:
    """Names of the jobs of a dry run: the rule, then model, data set and seed where it has them."""
    return {_name(job) for job in planned_jobs(folder, *configs, targets=targets)}


def planned_jobs(
    folder: Path, *configs: Path, targets: tuple[str, ...] = (), gpus: int = 1
) -> list[Any]:
    """Snakemake's jobs of a dry run on a number of GPUs, target rules left out."""
    from snakemake import api
    from snakemake.settings import types

    triggers = (types.RerunTrigger.MTIME, types.RerunTrigger.PARAMS, types.RerunTrigger.INPUT)
    profile = yaml.safe_load((PROFILE / "config.yaml").read_text(encoding="utf-8"))
    before = Path.cwd()
    try:
        with api.SnakemakeApi(types.OutputSettings(dryrun=True)) as snake:
            workflow = snake.workflow(
                types.ResourceSettings(
                    cores=2,
                    resources={"gpu": gpus},
                    default_resources=profile["default-resources"],
                ),
                config_settings=types.ConfigSettings(configfiles=configs),
                snakefile=PROJECT_ROOT / "Snakefile",
                workdir=folder,
            )
            settings = types.DAGSettings(
                targets=frozenset(targets), rerun_triggers=frozenset(triggers)
            )
            workflow.dag(dag_settings=settings).execute_workflow(executor="dryrun")
            graph = workflow._workflow.dag
            return [job for job in graph.jobs if graph.finished(job) and not job.rule.norun]
    finally:
        os.chdir(before)


def _name(job: Any) -> str:
    wildcards = job.wildcards_dict
    parts = [wildcards[key] for key in ("model", "dataset", "seed") if key in wildcards]
    return ":".join([job.rule.name, *parts])


class Finished:
    """A finished experiment, of which changed configurations are planned."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config

    def write(self, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
        """The configuration after `change`, as a file."""
        config = json.loads(json.dumps(self.config))  # a copy without YAML's shared anchors
        change(config)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path

    def reruns(self, change: Callable[[dict[str, Any]], Any], *targets: str) -> set[str]:
        """The jobs that run after `change` to the configuration, by default of all targets."""
        config = self.write("changed", change)
        return plan(self.folder, config, targets=targets or TARGETS)
