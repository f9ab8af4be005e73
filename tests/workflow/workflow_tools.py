"""Running and planning the workflow in a folder of its own, with real stages or stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
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
