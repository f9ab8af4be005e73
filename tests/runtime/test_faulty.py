"""What goes wrong on one process is dealt with by all of them alike."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import yaml

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.data.__main__ import main as prepare_data

PATH = os.pathsep.join([str(PROJECT_ROOT), str(PROJECT_ROOT / "src")])
ENVIRONMENT = {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}


def test_a_signal_a_nan_and_a_lack_of_memory_on_one_process_are_shared_by_all(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--multi_gpu", "--num_processes", "2", "-m", "tests.runtime.faulty"]
    result = subprocess.run(
        [sys.executable, *launcher, str(tmp_path)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    went_on = "ended with a checkpoint; goes on from step 1 of 8 when run again"
    assert first["told"] == f"tiny: another process was asked to end: {went_on}"
    assert second["told"] == f"tiny: runtime.time_budget_minutes (1e-09) used up: {went_on}"
    for found in (first, second):
        assert found["micro_batch_size"] == 1
        (rollback,) = found["rollbacks"]
        assert (rollback["from_step"], rollback["to_step"]) == (5, 3)
        assert rollback["reason"] == "loss is nan at step 6"
    assert "another process ran out of memory" in "\n".join(first["log"])
    weights = [(tmp_path / f"{rank}.safetensors").read_bytes() for rank in (0, 1)]
    assert weights[0] == weights[1]


def test_ctrl_c_ends_a_training_of_two_processes_with_one_checkpoint(tmp_path, monkeypatch):
    config = tmp_path / "tiny.yaml"
    training = {"steps": 5000, "batch_size": 8, "validate_every": 5000, "learning_rate": 1e-3}
    experiment = {
        "experiment": "tiny",
        "data": {"generated": {"train": 60, "validation": 3, "test": 3}},
        "base": {"architecture": {"hidden_size": 16}, "training": training},
        "models": {"base-itself": {"stage": "import", "from": "base"}},
        "runtime": {"device": "cpu", "checkpoint_every": 5000, "processes": 2},
        "tracking": {"enabled": False, "log_every": 1},
    }
    config.write_text(yaml.safe_dump(experiment))
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path))
    prepare_data(["--config", str(config)])
    with subprocess.Popen(
        [sys.executable, "-m", "latent_reasoning.base", "--config", str(config)],
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as stage:
        checkpoints = tmp_path / "tiny" / "checkpoints" / "base" / "seed-0"
        metrics, deadline = checkpoints / "metrics.jsonl", time.monotonic() + 300
        while not metrics.exists() or not metrics.read_text():
            assert stage.poll() is None, stage.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(stage.pid, signal.SIGINT)
        _, printed = stage.communicate(timeout=300)
    assert stage.returncode == 75, printed
    said = re.findall(r"ended with a checkpoint; goes on from step (\d+) of 5000", printed)
    assert len(said) == 1, printed
    assert "Traceback" not in printed
    assert (checkpoints / f"step-{said[0]}" / "state.json").is_file()
