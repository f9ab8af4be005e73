"""Running and planning the workflow in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from latent_reasoning.config import PROJECT_ROOT, read

STAND_IN = Path(__file__).with_name("stand_in_stage.py")
PROFILE = PROJECT_ROOT / "workflow" / "profiles" / "default"


def snakemake(
    folder: Path, *arguments: str | Path, snakefile: Path = PROJECT_ROOT / "Snakefile"
) -> subprocess.CompletedProcess[str]:
    """Run the command line in `folder`, with the results below it."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--snakefile", snakefile]
    command += ["--workflow-profile", PROFILE, "--directory", folder, *arguments]
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment(folder),
        cwd=folder,
    )


def environment(folder: Path) -> dict[str, str]:
    """The environment of a workflow whose results lie in `folder/results`."""
    own = {"LATENT_REASONING_RESULTS": str(folder / "results"), "NO_COLOR": "1"}
    return {**{k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}, **own}


def with_stand_ins(folder: Path) -> Path:
    """A Snakefile that is the project's own, but for the program that its jobs run."""
    snakefile = folder / "Snakefile"
    function = f'python() {{{{ {sys.executable} {STAND_IN} "$@"; }}}}; '
    snakefile.write_text(
        f'include: "{PROJECT_ROOT / "Snakefile"}"\n\n\nshell.prefix({function!r})\n',
        encoding="utf-8",
    )
    return snakefile


def plan(folder: Path, *configs: Path, targets: tuple[str, ...] = ()) -> set[str]:
    """The jobs of a dry run, as `rule` or `rule:model` or `rule:dataset`, targets left out."""
    from snakemake import api
    from snakemake.settings import types

    triggers = (types.RerunTrigger.MTIME, types.RerunTrigger.PARAMS, types.RerunTrigger.INPUT)
    before = Path.cwd()
    try:
        with api.SnakemakeApi(types.OutputSettings(dryrun=True)) as snake:
            workflow = snake.workflow(
                types.ResourceSettings(cores=2, resources={"gpu": 1}),
                config_settings=types.ConfigSettings(configfiles=configs),
                snakefile=PROJECT_ROOT / "Snakefile",
                workdir=folder,
            )
            settings = types.DAGSettings(
                targets=frozenset(targets), rerun_triggers=frozenset(triggers)
            )
            workflow.dag(dag_settings=settings).execute_workflow(executor="dryrun")
            graph = workflow._workflow.dag
            jobs = [job for job in graph.jobs if graph.finished(job) and not job.rule.norun]
            return {_name(job) for job in jobs}
    finally:
        os.chdir(before)


def _name(job: Any) -> str:
    wildcards = job.wildcards_dict
    parts = [wildcards[key] for key in ("model", "dataset", "seed") if key in wildcards]
    return ":".join([job.rule.name, *parts])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The test experiment with its appendix and an extra test set, finished by stand-ins."""
    folder = tmp_path_factory.mktemp("finished")
    extra = folder / "extra.jsonl"
    extra.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    config = read([PROJECT_ROOT / "config" / "test.yaml"])
    config["data"]["extra_tests"] = {"extra": str(extra)}
    config["evaluation"]["datasets"] = ["test", "extra"]
    done = Finished(folder, config)
    result = snakemake(
        folder,
        "--configfile",
        done.write("plain", lambda _: None),
        "--quiet",
        "--",
        "all",
        "appendix",
        snakefile=with_stand_ins(folder),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENT_REASONING_RESULTS", str(folder / "results"))
        yield done


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
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    def reruns(self, change: Callable[[dict[str, Any]], Any], *targets: str) -> set[str]:
        """The jobs that run after `change` to the configuration, by default of all targets."""
        config = self.write("changed", change)
        return plan(self.folder, config, targets=targets or ("all", "appendix"))
