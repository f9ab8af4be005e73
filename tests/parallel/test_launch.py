"""Several processes as a job meets them: killed, told to end, failing, and with a wrong file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.data.__main__ import main as prepare_data
from latent_reasoning.model.__main__ import main as make_base
from latent_reasoning.parallel import OneProcess

PATH = os.pathsep.join([str(PROJECT_ROOT), str(PROJECT_ROOT / "src")])
WAIT = """
import sys
from types import SimpleNamespace
from latent_reasoning.config import Runtime
from latent_reasoning.launch import start_processes
runtime = Runtime(device="cpu", processes=2)
start_processes("tests.parallel.waiting", sys.argv[1:], SimpleNamespace(runtime=runtime))
"""


def begin(*command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen, count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_to_one_process_ends_all_with_their_exit_code(tmp_path):
    process = begin("-c", WAIT, str(tmp_path))
    wait_for(tmp_path, "waiting-*", process, count=2)
    process.send_signal(signal.SIGUSR1)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75
    assert printed == ""


def test_a_process_that_fails_ends_the_job_with_its_message(tmp_path):
    process = begin("-c", WAIT, str(tmp_path), "1")
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: row 3 is bad" in printed
    assert "Traceback" not in printed


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """A tiny experiment with its rows prepared, to train the base of."""
    config = tmp_path / "tiny.yaml"
    training = {"steps": 30, "batch_size": 8, "validate_every": 15, "learning_rate": 1e-3}
    experiment = {
        "experiment": "tiny",
        "data": {"generated": {"train": 60, "validation": 3, "test": 3}},
        "base": {
            "architecture": {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.2},
            "training": training | {"select": "last"},
        },
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
    command = ["-m", "latent_reasoning.launch", "model", "--config", str(world / "tiny.yaml")]
    results = world / "two"
    process = begin(*command, LATENT_REASONING_RESULTS=str(results))
    wait_for(results, "tiny/checkpoints/base/seed-0/step-*", process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    process.kill()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert not left

    process = begin(*command, LATENT_REASONING_RESULTS=str(results))
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert printed.count("goes on after step") == 1
    assert "Traceback" not in printed

    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(world / "one"))
    make_base(["--config", str(world / "tiny.yaml")])
    one, two = (
        load_file(world / name / "tiny/base/seed-0/model.safetensors") for name in ("one", "two")
    )
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_a_wrong_configuration_is_refused_before_processes_start(tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text("experiment: x\nmodels: {}\nruntime: {processes: 0}\n")
    process = begin("-m", "latent_reasoning.launch", "sft", "--config", str(config))
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "runtime.processes" in printed
    assert "Traceback" not in printed


def test_one_process_has_everything_to_itself():
    alone = OneProcess()
    assert alone.share([1, 2, 3]) == alone.gather([1, 2, 3]) == [1, 2, 3]
    assert [alone.any_rank(flag) for flag in (False, True)] == [False, True]
    assert alone.purpose("rl step 3") == "rl step 3"
