"""Several processes as a job meets them: killed, told to end, failing, and with a wrong file."""

from __future__ import annotations

import os
import re
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


def begin(*command: str, session: bool = False, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listening(process: psutil.Process) -> set[str]:
    """The addresses at which a process waits for connections."""
    connections = process.net_connections("inet")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_all_listen_on_loopback_alone_and_a_signal_to_one_ends_all_with_its_exit_code(tmp_path):
    process = begin("-c", WAIT, str(tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("waiting-*"))) == 2, process)
    launcher = psutil.Process(process.pid)
    assert not listening(launcher)
    workers = launcher.children(recursive=True)
    assert len(workers) == 2
    for worker in workers:
        assert listening(worker) == {"127.0.0.1"}
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
def world(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Writes a tiny experiment and prepares its rows, to train the base of; returns its file."""

    def write(steps: int, checkpoint_every: int) -> Path:
        config = tmp_path / "tiny.yaml"
        training = {"steps": steps, "validate_every": steps, "learning_rate": 1e-3}
        shape = {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.2}
        experiment = {
            "experiment": "tiny",
            "data": {"generated": {"train": 60, "validation": 3, "test": 3}},
            "base": {
                "architecture": shape,
                "training": training | {"batch_size": 8, "select": "last"},
            },
            "evaluation": {"max_new_tokens": 4},
            "models": {"base-itself": {"stage": "import", "from": "base"}},
            "runtime": {"device": "cpu", "checkpoint_every": checkpoint_every, "processes": 2},
            "tracking": {"enabled": False, "log_every": 1},
        }
        config.write_text(yaml.safe_dump(experiment))
        for results in ("one", "two"):
            monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path / results))
            prepare_data(["--config", str(config)])
        return config

    return write


def test_a_killed_launcher_leaves_no_process_and_a_resumed_run_ends_as_one_process(
    world, monkeypatch
):
    config = world(steps=30, checkpoint_every=1)
    command = ["-m", "latent_reasoning.base", "--config", str(config)]
    results = config.parent / "two"
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
    assert printed.count("resumes after step") == 1
    assert "Traceback" not in printed

    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(config.parent / "one"))
    experiment = load(config)
    scratch.run(experiment, 0, science_digest(experiment, "base"))
    one, two = (
        load_file(config.parent / name / "tiny/base/seed-0/model.safetensors")
        for name in ("one", "two")
    )
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_ctrl_c_ends_a_training_of_two_processes_with_one_checkpoint(world):
    config = world(steps=5000, checkpoint_every=5000)
    checkpoints = config.parent / "two" / "tiny" / "checkpoints" / "base" / "seed-0"
    metrics = checkpoints / "metrics.jsonl"
    process = begin("-m", "latent_reasoning.base", "--config", str(config), session=True)
    wait_until(lambda: metrics.exists() and metrics.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 75, printed
    steps = re.findall(r"ended with a checkpoint; resumes from step (\d+) of 5000", printed)
    assert len(steps) == 1, printed
    assert "Traceback" not in printed
    assert (checkpoints / f"step-{steps[0]}" / "state.json").is_file()


def test_a_wrong_configuration_is_refused_once_before_processes_start(world):
    config = world(steps=30, checkpoint_every=1)
    process = begin("-m", "latent_reasoning.sft", "--config", str(config), "--model", "unknown")
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 2
    assert printed.count("error:") == 1
    assert "'unknown' is not in the configuration" in printed
    assert "Traceback" not in printed


def test_the_exit_code_is_that_of_the_process_which_ended_by_itself():
    assert _exit_code([-6, 2]) == 2
    assert _exit_code([75, 75]) == 75
    assert _exit_code([-9]) == 137
