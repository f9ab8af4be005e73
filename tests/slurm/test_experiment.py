"""The workflow through a real SLURM: trainings ended by it go on, and the results are the same.

The test experiment, with two models, runs with the SLURM profile, and by itself on this machine.
In the SLURM run each of the three trainings is ended once, in another way:

    base          is told that its time is nearly up (SIGUSR1, as `--signal` does): exits with 75
    latent-6      is cancelled by hand
    latent-6-rl   is taken away and queued again by SLURM, as in a preemption

They write no checkpoints by themselves: what goes on does so from the one that the signal made.
"""

from __future__ import annotations

import json
import subprocess
import sys
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
from tests.workflow.workflow_tools import environment, snakemake

pytestmark = pytest.mark.slurm

PROFILE = PROJECT_ROOT / "workflow" / "profiles" / "slurm"
STEPS = 300
INTERRUPTED_AFTER = 3
# Model, its rule, and the command that ends its job.
INTERRUPTIONS = {
    "base": ("base_model", ("scancel", "--signal=USR1")),
    "latent-6": ("latent_sft", ("scancel",)),
    "latent-6-rl": ("rl", ("scontrol", "requeue")),
}
MODELS = ("latent-6", "latent-6-rl")
LOCAL_RULES = ("tracking_store", "tables", "figures", "report")
EVALUATION = ("predictions.parquet", "forced.csv", "by_steps.csv")


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


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test experiment with two models, long trainings and a device that asks for a GPU."""
    config = yaml.safe_load((PROJECT_ROOT / "config" / "test.yaml").read_text(encoding="utf-8"))
    training = {"steps": STEPS, "validate_every": STEPS}
    for section in (config["base"], *(config["stages"][name] for name in ("latent_sft", "rl"))):
        section["training"] |= training
    config["models"] = {name: config["models"][name] for name in MODELS}
    config["report"]["appendix"] = []
    config["runtime"] |= {"device": "auto", "checkpoint_every": STEPS, "runtime_minutes": 30}
    file = tmp_path_factory.mktemp("config") / "slurm.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def through_slurm(cluster: Cluster, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The experiment through SLURM, each of its trainings ended once in the middle."""
    folder = tmp_path_factory.mktemp("through-slurm")
    command = [sys.executable, "-m", "snakemake", "--snakefile", PROJECT_ROOT / "Snakefile"]
    command += ["--workflow-profile", PROFILE, "--configfile", config]
    command += ["--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "10"]
    command += ["--default-resources", f"slurm_account={ACCOUNT}"]
    command += [f"slurm_partition={PARTITIONS[0]}", "--set-resources"]
    command += [f"rl:slurm_partition={PARTITIONS[1]}", "rl:mem_mb=5000", "rl:runtime=45"]
    command += ["evaluate:gpu=2"]
    output = folder / "snakemake.log"
    with output.open("wb") as log:
        workflow = subprocess.Popen(
            [str(part) for part in command],
            env=environment(folder) | cluster.environment | results_of(folder),
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    results = folder / "results" / "test"
    try:
        interrupted_after = interrupt_trainings(workflow, cluster, results)
        workflow.wait(timeout=240)
    finally:
        workflow.terminate()
        workflow.wait(timeout=60)
    assert workflow.returncode == 0, output.read_text(encoding="utf-8")
    return Run(results, interrupted_after, cluster.jobs())


def results_of(folder: Path) -> dict[str, str]:
    """What `environment` adds to the variables that this process has."""
    names = ("LATENT_REASONING_RESULTS", "MLFLOW_TRACKING_URI", "NO_COLOR")
    return {name: environment(folder)[name] for name in names}


def interrupt_trainings(
    workflow: subprocess.Popen[bytes], cluster: Cluster, results: Path
) -> dict[str, int]:
    """End each training once it has made some steps; returns how many were logged then."""
    after: dict[str, int] = {}
    deadline = time.monotonic() + 300
    for model, (rule, command) in INTERRUPTIONS.items():
        metrics = results / "checkpoints" / model / "seed-0" / "metrics.jsonl"
        while len(logged_steps(metrics)) < INTERRUPTED_AFTER:
            assert workflow.poll() is None, f"ended before all were interrupted: {after}"
            assert time.monotonic() < deadline, f"{model} made no steps"
            time.sleep(0.05)
        cluster.run(*command, job_in_queue(cluster, rule))
        after[model] = len(logged_steps(metrics))
    return after


def job_in_queue(cluster: Cluster, rule: str) -> str:
    """The number of the running job of a rule."""
    lines = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%A %k").splitlines()
    return next(line.split()[0] for line in lines if f" rule_{rule}_" in line)


def logged_steps(metrics: Path) -> list[int]:
    """The steps in a training's metrics so far, whole lines alone."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines]


# ------------------------------------------------------------------------------------ the tests


def test_jobs_run_through_slurm_and_small_ones_where_snakemake_does(through_slurm, counted):
    rules = Counter(job["Comment"].removeprefix("rule_") for job in through_slurm.jobs)
    assert rules == {
        "prepare_data": 1,
        "base_model_wildcards_0": 2,
        "latent_sft_wildcards_latent-6_0": 2,
        "rl_wildcards_latent-6-rl_0": 2,
        **{f"evaluate_wildcards_{model}_0_test": 1 for model in MODELS},
    }
    for rule in LOCAL_RULES:
        assert (through_slurm.results / "logs" / f"{rule}.log").exists(), rule
    counted.append(f"{sum(rules.values())} jobs run, {len(LOCAL_RULES)} beside it")


def test_each_training_was_ended_by_slurm_and_started_once_more(through_slurm, counted):
    states = {
        rule: [job["State"].split()[0] for job in through_slurm.jobs_of(rule)]
        for rule, _ in INTERRUPTIONS.values()
    }
    assert states == {
        "base_model": ["FAILED", "COMPLETED"],
        "latent_sft": ["CANCELLED", "COMPLETED"],
        "rl": ["REQUEUED", "COMPLETED"],
    }
    ends = "1 warned of its time limit, 1 cancelled, 1 requeued"
    counted.append(f"{len(states)} trainings ended in the middle: {ends}")


def test_each_training_goes_on_from_the_step_that_it_was_ended_at(through_slurm, counted):
    went_on = {}
    for model, (rule, _) in INTERRUPTIONS.items():
        logs = through_slurm.results / "logs" / rule
        log = logs / "seed-0.log" if model == "base" else logs / model / "seed-0.log"
        text = log.read_text(encoding="utf-8")
        assert f"{model}: goes on after step " in text
        went_on[model] = int(text.split("goes on after step ")[1].split()[0].strip(".,:;"))
        assert through_slurm.interrupted_after[model] <= went_on[model] < STEPS
        checkpoints = through_slurm.results / "checkpoints" / model / "seed-0"
        assert logged_steps(checkpoints / "metrics.jsonl") == list(range(1, STEPS + 1))
    steps = ", ".join(f"{model} after step {step}" for model, step in went_on.items())
    counted.append(f"{len(went_on)} trainings resumed, of {STEPS} steps: {steps}")


def test_account_partition_memory_time_and_gpus_reach_slurm(through_slurm):
    for job in through_slurm.jobs:
        assert job["Account"] == ACCOUNT
        is_rl = job["Comment"].startswith("rule_rl")
        assert job["Partition"] == PARTITIONS[is_rl]
    asked = {
        rule: (through_slurm.jobs_of(rule)[0]["ReqTRES"], job["TimelimitRaw"])
        for rule in ("prepare_data", "latent_sft", "rl", "evaluate")
        for job in through_slurm.jobs_of(rule)
    }
    assert asked == {
        "prepare_data": ("billing=1,cpu=1,mem=4000M,node=1", "60"),
        "latent_sft": ("billing=1,cpu=1,gres/gpu=1,mem=4000M,node=1", "30"),
        "rl": ("billing=1,cpu=1,gres/gpu=1,mem=5000M,node=1", "45"),
        "evaluate": ("billing=1,cpu=1,gres/gpu=2,mem=4000M,node=1", "30"),
    }


def test_the_results_are_those_of_a_run_on_one_machine(through_slurm, config, tmp_path, counted):
    targets = [f"results/test/evaluations/{model}/seed-0/test/summary.json" for model in MODELS]
    local = snakemake(tmp_path, "--configfile", config, "--", *targets)
    assert local.returncode == 0, local.stdout + local.stderr
    results = tmp_path / "results" / "test"
    folders = ["base/seed-0", *(f"models/{model}/seed-0" for model in MODELS)]
    files = [f"{folder}/model.safetensors" for folder in folders]
    files += [f"evaluations/{m}/seed-0/test/{name}" for m in MODELS for name in EVALUATION]
    files += [f"data/{split}.jsonl" for split in ("sft", "rl", "validation", "test")]
    for name in files:
        assert same(through_slurm.results / name, results / name), name
    counted.append(f"{len(files)} files compared with a run on one machine, {len(files)} equal")


def same(first: Path, second: Path) -> bool:
    """Whether two files hold the same bits, or tables the same rows."""
    if first.suffix == ".parquet":
        return pandas.read_parquet(first).equals(pandas.read_parquet(second))
    return first.read_bytes() == second.read_bytes()


def test_nothing_is_left_of_a_cluster_that_a_failure_ends(tmp_path, counted):
    skip_without_slurm()
    cluster, before = None, 0
    with pytest.raises(ZeroDivisionError), started(tmp_path / "slurm") as cluster:
        before = len(processes_with_a_job(cluster))
        raise ZeroDivisionError
    assert before >= 5 + 3  # the daemons, and the job's
    assert cluster.processes() == []
    counted.append(f"{before} processes of a failing test ended, 0 left")


def processes_with_a_job(cluster: Cluster) -> list[psutil.Process]:
    """All processes of a cluster, once a job of it runs."""
    cluster.run("sbatch", "--output=/dev/null", "--wrap", "srun sleep 600")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        processes = cluster.processes()
        if "sleep" in {process.name() for process in processes}:
            return processes
        time.sleep(0.1)
    raise TimeoutError("the job does not start")
