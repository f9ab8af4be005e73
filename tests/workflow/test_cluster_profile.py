"""What the SLURM profile plans and submits, without a SLURM; tests/slurm runs it."""

from __future__ import annotations

import shlex

import pytest
import yaml
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.config.data import TRAINED
from tests.workflow.workflow_tools import environment, planned_jobs, run

PAPER = PROJECT_ROOT / "config" / "paper.yaml"
H100 = PROJECT_ROOT / "config" / "h100.yaml"
PROFILE = PROJECT_ROOT / "workflow" / "profiles" / "slurm"
NAMES = {"run_uuid": "id", "slurm_logfile": "log", "comment_str": "", "workdir": ""}


def submitted(job) -> list[str]:
    """The words of the `sbatch` call that the plugin makes of a job."""
    call = get_submit_command(job, NAMES | {"account": "", "partition": ""})
    return shlex.split(call + set_gres_string(job))


def test_the_paper_is_planned_with_the_profile_though_no_local_cores_are_given(tmp_path):
    arguments = ["-m", "snakemake", "-n", "--snakefile", PROJECT_ROOT / "Snakefile"]
    arguments += ["--workflow-profile", PROFILE, "--configfile", PAPER, H100]
    arguments += ["--default-resources", "slurm_account=group", "slurm_partition=gpu"]
    result = run(arguments, tmp_path, environment(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "RL: latent-6-rl, seed 0" in result.stdout + result.stderr
    assert "on one H100" in result.stderr


@pytest.mark.parametrize(("rule", "gpus"), [("rl", 1), ("latent_sft", 1), ("prepare_data", 0)])
def test_what_a_rule_asks_for_reaches_sbatch(tmp_path, monkeypatch, rule, gpus):
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / "results"))
    job = next(job for job in planned_jobs(tmp_path, PAPER, H100) if job.rule.name == rule)
    words = submitted(job)
    assert words[words.index("-t") + 1] == str(job.resources["runtime"])
    assert words[words.index("--mem") + 1] == str(job.resources["mem_mb"])
    assert [word for word in words if word.startswith("--gpus")] == ["--gpus=h100:1"] * gpus


def test_every_training_is_warned_before_its_time_limit():
    profile = yaml.safe_load((PROFILE / "config.yaml").read_text(encoding="utf-8"))
    trainings = ("base_model", *TRAINED)
    warned = {"slurm_extra": "'--signal=USR1@300'"}
    assert profile["set-resources"] == dict.fromkeys(trainings, warned)
    assert "default-resources" not in profile  # those of your own profile come through
