"""A folder in which the real workflow runs, and everything that a fault needs to know of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import psutil
import yaml

from latent_reasoning.config import PROJECT_ROOT
from tests.workflow.workflow_tools import PROFILE, environment

MARK = "FAULT_CAMPAIGN"
"""Environment variable of every process that a workbench starts, and of those they start."""
SECONDS_TO_END = 60.0
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Run:
    """A Snakemake that has ended."""

    returncode: int
    output: str

    @property
    def failed_rules(self) -> list[str]:
        """The rules of the jobs that failed."""
        lines = (line for line in self.output.splitlines() if line.startswith("Error in rule "))
        return [line.removeprefix("Error in rule ").rstrip(":") for line in lines]


@dataclass(frozen=True)
class Started:
    """A Snakemake that was started, and the file of its output."""

    process: subprocess.Popen[str]
    output: Path

    @property
    def runs(self) -> bool:
        return self.process.poll() is None


@dataclass(frozen=True)
class Job:
    """A running stage: its process, its rule, and its name (the rule with its wildcards)."""

    process: psutil.Process
    rule: str
    name: str

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far, which does not depend on what else the machine does."""
        with contextlib.suppress(psutil.Error):
            times = self.process.cpu_times()
            return times.user + times.system
        return 0.0


@dataclass
class Workbench:
    """An experiment in a folder of its own: `folder/results/`, `folder/experiment.yaml`."""

    folder: Path
    cores: int = 2
    surroundings: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "experiment.yaml"

    @property
    def root(self) -> Path:
        return self.folder / "results"

    @cached_property
    def experiment(self) -> dict:
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    @property
    def results(self) -> Path:
        """The folder of the experiment."""
        return self.root / self.experiment["experiment"]

    def copy(self, folder: Path, **options) -> Workbench:
        """The same experiment, as far as it has come, in another folder."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workbench(folder, **options)

    # ---------------------------------------------------------------------------- Snakemake

    def environment(self) -> dict[str, str]:
        """The environment of the workflow, with whatever this bench's fault adds to it."""
        own = {"OMP_NUM_THREADS": "1", MARK: str(self.folder)}
        return environment(self.folder) | own | self.surroundings

    def start(self, *arguments: str | Path) -> Started:
        """Start Snakemake; its output goes to `snakemake-N.out`, N the number of the start."""
        command = [sys.executable, "-m", "snakemake", "--cores", self.cores, "--snakefile"]
        command += [PROJECT_ROOT / "Snakefile", "--workflow-profile", PROFILE]
        command += ["--configfile", self.config, *arguments]
        number = len(list(self.folder.glob("snakemake-*.out"))) + 1
        output = self.folder / f"snakemake-{number}.out"
        with output.open("w", encoding="utf-8") as stream:
            workflow = subprocess.Popen(
                [str(part) for part in command],
                env=self.environment(),
                cwd=self.folder,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
            )
        return Started(workflow, output)

    def finish(self, started: Started) -> Run:
        """Wait for a started Snakemake."""
        returncode = started.process.wait()
        return Run(returncode, started.output.read_text(encoding="utf-8", errors="replace"))

    def run(self, *targets: str | Path) -> Run:
        """Run Snakemake up to its end."""
        return self.finish(self.start("--", *targets))

    def path_of(self, result: str) -> str:
        """What Snakemake calls a result that is given by its path below the experiment's folder."""
        return f"results/{self.experiment['experiment']}/{result}"

    def make(self, result: str) -> Run:
        """Ask for one result, by its path below the experiment's folder."""
        return self.run(self.path_of(result))

    def unlock(self) -> Run:
        """What the documentation tells a user to do after a killed Snakemake."""
        return self.finish(self.start("--unlock"))

    # ---------------------------------------------------------------------------- processes

    def processes(self) -> list[psutil.Process]:
        """All living processes of this bench, also those whose parent is gone."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(MARK) == str(self.folder):
                    found.append(process)
        return found

    def jobs(self, workflow: Started) -> Iterator[Job]:
        """The stages that a Snakemake is running."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(workflow.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    if process.name().startswith("python") and (job := self._job(process)):
                        yield job

    def _job(self, process: psutil.Process) -> Job | None:
        """A stage's standard output is its log, `logs/RULE[/wildcards].log`."""
        if not any(word.startswith("latent_reasoning.") for word in process.cmdline()):
            return None
        log = Path(f"/proc/{process.pid}/fd/1").readlink()
        if not log.is_relative_to(self.results / "logs"):
            return None
        name = log.relative_to(self.results / "logs").with_suffix("")
        return Job(process, name.parts[0], str(name))

    def orphans(self) -> list[str]:
        """Processes still there after the time in which they are to end; they are ended then."""
        deadline = time.monotonic() + SECONDS_TO_END
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        names = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(process.cmdline()))
                process.send_signal(signal.SIGKILL)
        return names


def seconds_by_rule(results: Path) -> dict[str, float]:
    """Processor seconds of a job of each rule, as Snakemake measured them."""
    measured: dict[str, list[float]] = {}
    for file in (results / "benchmarks").rglob("*.tsv"):
        rule = file.relative_to(results / "benchmarks").parts[0].removesuffix(".tsv")
        names, values = (line.split("\t") for line in file.read_text("utf-8").splitlines()[:2])
        value = dict(zip(names, values, strict=True))["cpu_time"]
        measured.setdefault(rule, []).append(float(value) if value not in ("NA", "-") else 1.0)
    return {rule: sum(values) / len(values) for rule, values in measured.items()}


def write_experiment(folder: Path, experiment: Mapping) -> None:
    """Write `experiment.yaml`, without YAML's shared anchors."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(json.loads(json.dumps(experiment)), sort_keys=False)
    (folder / "experiment.yaml").write_text(text, encoding="utf-8")
