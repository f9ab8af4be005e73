"""Trainings under Snakemake that are asked to end, or whose time is up."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import yaml

from tests.workflow.workflow_tools import TEST_CONFIG, running, snakemake, when_logged

BASE = "results/test/base/seed-0"


def write_config(folder: Path, *, steps: int, **runtime) -> Path:
    """The test experiment with `steps` steps of the base model and no tracking."""
    config = yaml.safe_load(TEST_CONFIG.read_text(encoding="utf-8"))
    config["base"]["training"] |= {"steps": steps, "validate_every": steps}
    config["runtime"] |= runtime
    config["tracking"] = {"enabled": False, "log_every": 1}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def test_ctrl_c_keeps_what_was_trained_and_a_used_up_budget_is_tried_again(tmp_path):
    log = tmp_path / "results" / "test" / "logs" / "base_model" / "seed-0.log"
    checkpoints = tmp_path / "results" / "test" / "checkpoints" / "base" / "seed-0"
    steps = 3000
    config = write_config(tmp_path, steps=steps, checkpoint_every=steps)

    def interrupt(name: str) -> None:
        """What a terminal does at Ctrl-C: to Snakemake, to the job's shell and to the training."""
        os.killpg(workflow.pid, signal.SIGINT)

    with running(tmp_path, "--cores=1", "--configfile", config, "--", BASE) as workflow:
        when_logged(workflow, {"base": checkpoints}, 1, interrupt)
        assert workflow.wait(60) != 0
    last = log.read_text(encoding="utf-8").splitlines()[-1]
    match = re.fullmatch(
        r"base: SIGINT received: ended with a checkpoint; "
        rf"resumes from step (\d+) of {steps} when run again",
        last,
    )
    assert match, last
    assert (checkpoints / f"step-{match[1]}" / "state.json").is_file()

    config = write_config(tmp_path, steps=3, time_budget_minutes=1e-9)
    result = snakemake(tmp_path, "--configfile", config, "--", BASE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (result.stdout + result.stderr).count("Trying to restart job") == 2
    assert (tmp_path / BASE / "model.safetensors").is_file()
    assert "base: resumes after step 2" in log.read_text(encoding="utf-8")
