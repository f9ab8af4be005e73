"""What goes wrong on one process is dealt with by all of them alike."""

import json
import os
import subprocess
import sys

from latent_reasoning.config import PROJECT_ROOT


def test_a_signal_a_nan_and_a_lack_of_memory_on_one_process_are_shared_by_all(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--multi_gpu", "--num_processes", "2", "-m", "tests.parallel.faulty"]
    path = os.pathsep.join([str(PROJECT_ROOT), str(PROJECT_ROOT / "src")])
    result = subprocess.run(
        [sys.executable, *launcher, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
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
