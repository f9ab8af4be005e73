"""Two processes train as one does, and what goes wrong on one of them both deal with alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.rl import reward
from latent_reasoning.training.metrics import read_metrics
from tests.runtime.trainings import STEPS, TRAININGS, half_are_right, run_all

# Losses are of the order of 4, weights of 0.3, all in float64.
LARGEST_DIFFERENCE = 1e-13


def train_with_two_processes(folder: Path) -> None:
    """Run `trainings.py` under accelerate's launcher, as a user may."""
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--multi_gpu", "--num_processes", "2"]
    path = os.pathsep.join([str(PROJECT_ROOT), str(PROJECT_ROOT / "src")])
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.runtime.trainings", str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Of one process and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "judge_sample", half_are_right)
        run_all(one)
    train_with_two_processes(two)
    return one, two


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_give_the_losses_and_weights_of_one(folders, name):
    one, two = (read_metrics(folder / f"{name}-0.jsonl") for folder in folders)
    assert [list(row) for row in one] == [list(row) for row in two]
    assert sum("loss" in row for row in one) == STEPS
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=0, abs=LARGEST_DIFFERENCE)
    first, second = (load_file(folder / f"{name}-0.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for tensor in first:
        assert (first[tensor] - second[tensor]).abs().max().item() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", TRAININGS)
def test_both_processes_hold_bitwise_the_same_weights(folders, name):
    first, second = (folders[1] / f"{name}-{rank}.safetensors" for rank in (0, 1))
    assert first.read_bytes() == second.read_bytes()


def test_a_signal_a_nan_and_a_lack_of_memory_on_one_process_are_shared_by_all(folders):
    first, second = (json.loads((folders[1] / f"faulty-{r}.json").read_text()) for r in (0, 1))
    ended = "ended with a checkpoint; resumes from step 1 of 8 when run again"
    assert first["interruption"] == f"tiny: another process was asked to end: {ended}"
    budget = "runtime.time_budget_minutes (1e-09) used up"
    assert second["interruption"] == f"tiny: {budget}: {ended}"
    for found in (first, second):
        assert found["micro_batch_size"] == 1
        (rollback,) = found["rollbacks"]
        assert (rollback["from_step"], rollback["to_step"]) == (5, 3)
        assert rollback["reason"] == "loss is nan at step 6"
    assert "another process ran out of memory" in "\n".join(first["log"])
    weights = [(folders[1] / f"faulty-{rank}.safetensors").read_bytes() for rank in (0, 1)]
    assert weights[0] == weights[1]
