"""Several processes as a job meets them: killed, told to end, failing, and with a wrong file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from latent_reasoning.base import scratch
from latent_reasoning.config import PROJECT_ROOT, load
from latent_reasoning.dag.digests import science_digest
from latent_reasoning.data.__main__ import main as prepare_data
from latent_reasoning.runtime.launch import _exit_code

PATH = os.pathsep.join([str(PROJECT_ROOT), str(PROJECT_ROOT / "src")])
WAIT = """
import sys
from latent_reasoning.config import Runtime
from latent_reasoning.runtime.launch import launch_processes
launch_processes("tests.runtime.waiting", sys.argv[1:], Runtime(device="cpu", processes=2))
"""


def begin(*command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_to_one_process_ends_all_with_their_exit_code(tmp_path):
    process = begin("-c", WAIT, str(tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("waiting-*"))) == 2, process)
    process.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 75
    assert printed == ""


def test_a_process_that_fails_ends_the_job_with_its_message(tmp_path):
    process = begin("-c", WAIT, str(tmp_path), "1")
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "error: row 3 is bad" in printed
    assert "Traceback" not in printed


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A tiny experiment with its rows prepared, to train the base of."""
    config = tmp_path / "tiny.yaml"
    training = {"steps": 30, "batch_size": 8, "validate_every": 30, "learning_rate": 1e-3}
    experiment = {
        "experiment": "tiny",
        "data": {"generated": {"train": 60, "validation": 3, "test": 3}},
        "base": {
            "architecture": {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.2},
            "training": training | {"select": "last"},
        },
        "evaluation": {"max_new_tokens": 4},
        "models": {"base-itself": {"stage": "import", "from": "base"}},
        "runtime": {"device": "cpu", "checkpoint_every": 1, "processes": 2},
        "tracking": {"enabled": False},
    }
    config.write_text(yaml.safe_dump(experiment))
    for results in ("one", "two"):
        monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / results))
        prepare_data(["--config", str(config)])
    return tmp_path


def test_a_killed_launcher_leaves_no_process_and_a_resumed_run_ends_as_one_process(
    world, monkeypatch
):
    command = ["-m", "latent_reasoning.base", "--config", str(world / "tiny.yaml")]
    results = world / "two"
    checkpoints = results / "tiny" / "checkpoints" / "base" / "seed-0"

    process = begin(*command, LATENT_REASONING_RESULTS=str(results))
    wait_until(lambda: any(checkpoints.glob("step-[1-9]*")), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    process.kill()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left

    process = begin(*command, LATENT_REASONING_RESULTS=str(results))
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert printed.count("goes on after step") == 1
    assert "Traceback" not in printed

    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(world / "one"))
    config = load(world / "tiny.yaml")
    scratch.run(config, 0, science_digest(config, "base"))
    one, two = (
        load_file(world / name / "tiny/base/seed-0/model.safetensors") for name in ("one", "two")
    )
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_a_wrong_configuration_is_refused_once_before_processes_start(world):
    command = ["-m", "latent_reasoning.sft", "--config", str(world / "tiny.yaml")]
    process = begin(*command, "--model", "unknown")
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 2
    assert printed.count("error:") == 1
    assert "'unknown' is not in the configuration" in printed
    assert "Traceback" not in printed


def test_the_exit_code_is_that_of_the_process_which_ended_by_itself():
    assert _exit_code([-6, 2]) == 2
    assert _exit_code([75, 75]) == 75
    assert _exit_code([-9]) == 137
