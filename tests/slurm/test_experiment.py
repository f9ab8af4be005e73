"""The workflow through a real SLURM: trainings ended by it resume, and the results are the same.

The test experiment, with three models, runs with the SLURM profile, and at the same time by itself
on this machine. In the SLURM run two trainings are ended once, in the middle:

    cot-sft    is told that its time is nearly up (SIGUSR1, as `--signal` does), and exits with 75
    latent-6   is cancelled by hand

They write no checkpoints by themselves: a training resumes from the one that the signal made.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas
import psutil
import pytest
import yaml

from latent_reasoning.config import PROJECT_ROOT
from tests.slurm.cluster import ACCOUNT, PARTITIONS, Cluster, started
from tests.slurm.conftest import skip_without_slurm
from tests.workflow.workflow_tools import TEST_CONFIG, logged_steps, running, when_logged

pytestmark = pytest.mark.slurm

PROFILE = PROJECT_ROOT / "workflow" / "profiles" / "slurm"
INTERRUPTED_AFTER = 3
# Model, its rule, the command that ends its job, and steps enough to be caught in the middle.
INTERRUPTIONS = {
    "cot-sft": ("sft", ("scancel", "--signal=USR1"), 1000),
    "latent-6": ("latent_sft", ("scancel",), 300),
}
MODELS = ("cot-sft", "latent-6", "latent-6-rl")
# A fake GPU of the cluster may have the number of a real one: both runs are to be on the CPU.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
LOCAL_RULES = ("tracking_store", "tables", "figures", "report")
EVALUATED = "evaluations/latent-6-rl/seed-0/test"


@dataclass
class Run:
    """A finished run of the experiment through SLURM."""

    results: Path
    interrupted_after: dict[str, int]
    jobs: list[dict[str, str]]

    def jobs_of(self, rule: str) -> list[dict[str, str]]:
        """The accounts of a rule's jobs; the plugin names it in the comment."""
        return [
            job for job in self.jobs if job["Comment"].split("_wildcards_")[0] == f"rule_{rule}"
        ]


def finish(workflow: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for Snakemake's end; a failure shows what it said."""
    assert workflow.wait(timeout=900) == 0, (folder / "output").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test experiment with three models, two of them trained longer, on any device."""
    config = yaml.safe_load(TEST_CONFIG.read_text(encoding="utf-8"))
    config["models"] = {name: config["models"][name] for name in MODELS}
    for name, (_, _, steps) in INTERRUPTIONS.items():
        # At the experiment's learning rate this number of steps diverges, and is rolled back.
        training = {"steps": steps, "validate_every": steps, "learning_rate": 3e-4}
        config["models"][name]["training"] = training
    config["report"]["appendix"] = []
    config["runtime"] |= {"device": "auto", "checkpoint_every": 1000, "runtime_minutes": 30}
    file = tmp_path_factory.mktemp("config") / "slurm.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the SLURM profile with entries for single rules, as a user would make it."""
    values = yaml.safe_load((PROFILE / "config.yaml").read_text(encoding="utf-8"))
    values["default-resources"] = {"slurm_account": ACCOUNT, "slurm_partition": PARTITIONS[0]}
    resources = values["set-resources"]
    resources["rl"] |= {"slurm_partition": PARTITIONS[1], "mem_mb": 5000, "runtime": 45}
    resources["evaluate"] = {"gpu": 2}
    values["slurm-init-seconds-before-status-checks"] = 3
    folder = tmp_path_factory.mktemp("profile")
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(
    cluster: Cluster, config: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Path]:
    """The experiment through SLURM, two trainings ended once; results of one on this machine."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("this-machine", "slurm"))
    targets = ["results/test/models/cot-sft/seed-0", f"results/test/{EVALUATED}/summary.json"]
    results = there / "results" / "test"
    checkpoints = {model: results / "checkpoints" / model / "seed-0" for model in INTERRUPTIONS}
    variables = NO_GPU | cluster.variables
    alone = ("--cores=1", "--configfile", config, "--", *targets)

    def interrupt(model: str) -> None:
        rule, command, _ = INTERRUPTIONS[model]
        cluster.run(*command, job_in_queue(cluster, rule))

    with (
        running(here, *alone, variables=NO_GPU) as local,
        running(there, "--configfile", config, profile=profile, variables=variables) as workflow,
    ):
        interrupted_after = when_logged(workflow, checkpoints, INTERRUPTED_AFTER, interrupt)
        finish(workflow, there)
        finish(local, here)
    return Run(results, interrupted_after, cluster.jobs()), here / "results" / "test"


@pytest.fixture(scope="module")
def through_slurm(finished: tuple[Run, Path]) -> Run:
    return finished[0]


def job_in_queue(cluster: Cluster, rule: str) -> str:
    """The number of the running job of a rule."""
    lines = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%A %k").splitlines()
    return next(line.split()[0] for line in lines if f" rule_{rule}_" in line)


# ------------------------------------------------------------------------------------ the tests


def test_jobs_run_through_slurm_and_small_ones_where_snakemake_does(through_slurm):
    jobs = Counter(job["Comment"].removeprefix("rule_") for job in through_slurm.jobs)
    assert jobs == {
        "prepare_data": 1,
        "base_model_wildcards_0": 1,
        "sft_wildcards_cot-sft_0": 2,
        "latent_sft_wildcards_latent-6_0": 2,
        "rl_wildcards_latent-6-rl_0": 1,
        **{f"evaluate_wildcards_{model}_0_test": 1 for model in MODELS},
    }
    for rule in LOCAL_RULES:
        assert (through_slurm.results / "logs" / f"{rule}.log").exists(), rule


def test_trainings_that_slurm_ended_are_started_once_more(through_slurm):
    states = {
        rule: [job["State"].split()[0] for job in through_slurm.jobs_of(rule)]
        for rule, _, _ in INTERRUPTIONS.values()
    }
    assert states == {"sft": ["FAILED", "COMPLETED"], "latent_sft": ["CANCELLED", "COMPLETED"]}


def test_trainings_resume_from_the_step_that_they_were_ended_at(through_slurm):
    for model, (rule, _, last) in INTERRUPTIONS.items():
        log = through_slurm.results / "logs" / rule / model / "seed-0.log"
        said = re.search(rf"{model}: resumes after step (\d+)", log.read_text(encoding="utf-8"))
        assert said, log
        assert through_slurm.interrupted_after[model] <= int(said[1]) < last
        steps = logged_steps(through_slurm.results / "checkpoints" / model / "seed-0")
        assert steps == sorted(steps)
        assert set(steps) == set(range(1, last + 1))


def test_account_partition_memory_time_and_gpus_of_each_rule_reach_slurm(through_slurm):
    accounts = ("Account", "Partition", "ReqTRES", "TimelimitRaw")
    asked = {
        rule: {tuple(job[name] for name in accounts) for job in through_slurm.jobs_of(rule)}
        for rule in ("prepare_data", "latent_sft", "rl", "evaluate")
    }
    short, long = PARTITIONS
    assert asked == {
        "prepare_data": {(ACCOUNT, short, "billing=1,cpu=1,mem=4000M,node=1", "60")},
        "latent_sft": {(ACCOUNT, short, "billing=1,cpu=1,gres/gpu=1,mem=4000M,node=1", "30")},
        "rl": {(ACCOUNT, long, "billing=1,cpu=1,gres/gpu=1,mem=5000M,node=1", "45")},
        "evaluate": {(ACCOUNT, short, "billing=1,cpu=1,gres/gpu=2,mem=4000M,node=1", "30")},
    }


def test_slurm_is_to_warn_trainings_and_to_start_again_what_it_takes_away(through_slurm):
    for rule in ("base_model", "sft", "latent_sft", "rl", "evaluate"):
        for job in through_slurm.jobs_of(rule):
            assert ("--signal=USR1@300" in job["SubmitLine"]) == (rule != "evaluate")
            assert "--requeue" in job["SubmitLine"]


def test_the_results_are_those_of_a_run_on_one_machine(finished):
    through_slurm, local = finished
    folders = ["base/seed-0", *(f"models/{model}/seed-0" for model in MODELS)]
    files = [f"{folder}/model.safetensors" for folder in folders]
    files += [f"{EVALUATED}/{name}" for name in ("predictions.parquet", "forced.csv")]
    files += [f"data/{split}.jsonl" for split in ("sft", "rl", "validation", "test")]
    for name in files:
        assert same(through_slurm.results / name, local / name), name


def same(first: Path, second: Path) -> bool:
    """Whether two files hold the same bits, or tables the same rows."""
    if first.suffix == ".parquet":
        return pandas.read_parquet(first).equals(pandas.read_parquet(second))
    return first.read_bytes() == second.read_bytes()


def test_nothing_is_left_of_a_cluster_that_a_failure_ends(tmp_path):
    skip_without_slurm()
    cluster = Cluster(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail_amid_a_job(cluster, before := [])
    assert len(before) >= 5 + 3  # the daemons, and the job's
    assert cluster.processes() == []


def fail_amid_a_job(cluster: Cluster, processes: list[psutil.Process]) -> None:
    """Start `cluster` and a job on it, list all their processes, and fail."""
    with started(cluster):
        cluster.run("sbatch", "--output=/dev/null", "--wrap", "srun sleep 600")
        deadline = time.monotonic() + 30
        while "sleep" not in {process.name() for process in processes}:
            assert time.monotonic() < deadline, "the job does not start"
            processes[:] = cluster.processes()
        raise ZeroDivisionError
