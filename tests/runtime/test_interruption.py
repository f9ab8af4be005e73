"""Trainings that are asked to end: real signals to real processes, and time budgets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from latent_reasoning.runtime.signals import (
    TrainingInterruptedError,
    stop_request,
)
from latent_reasoning.training.checkpoints import CheckpointStore
from tests.training.tiny_training import (
    TinyTask,
    assert_bitwise_equal,
    out_of_time,
    run,
    settings,
    tiny_model,
    weights,
)

STEPS = 100
TRAINING = {"steps": STEPS, "validate_every": STEPS, "select": "last"}
CHILD = """
import sys
import torch
from pathlib import Path
from tests.training.tiny_training import TinyTask, run, settings, tiny_model
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.runtime.signals import stop_request
from latent_reasoning.runtime.parallel import ALONE

class Log:
    append = staticmethod(ALONE.print)

def main(_):
    torch.set_num_threads(1)
    task = TinyTask(tiny_model(), seconds_a_step=0.2)
    training = settings(steps=100, validate_every=100, select="last")
    with stop_request(None) as stop:
        run(Path(sys.argv[1]), task, training, checkpoint_every=1000, log=Log, stop=stop)

run_stage(main)
"""


def child(folder: Path) -> subprocess.Popen[str]:
    """A training of 100 steps in a process of its own, after its first steps."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert line.startswith("tiny  step 2/100"), line
    return process


def test_a_signal_ends_a_training_with_a_checkpoint_from_which_it_goes_on(tmp_path):
    process = child(tmp_path / "c")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(300) == 75
    noted, last = process.stderr.read().splitlines()
    step = CheckpointStore(tmp_path / "c", "a", print).steps()[-1]
    assert 2 <= step < STEPS
    assert noted == "SIGUSR1: ends after this step, with a checkpoint"
    assert last == (
        "tiny: SIGUSR1 received: ended with a checkpoint; "
        f"resumes from step {step} of {STEPS} when run again"
    )
    torch.set_num_threads(1)
    resumed, whole, log = tiny_model(), tiny_model(), []
    run(tmp_path / "c", TinyTask(resumed), settings(**TRAINING), checkpoint_every=STEPS, log=log)
    assert f"tiny: resumes after step {step}" in log
    run(tmp_path / "whole", TinyTask(whole), settings(**TRAINING), checkpoint_every=STEPS)
    assert_bitwise_equal(weights(resumed), weights(whole))
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("c", "whole")]
    assert metrics[0] == metrics[1]


def test_a_second_ctrl_c_ends_at_once():
    with stop_request(None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        assert stop.reason == "SIGINT received"
        stop.note(signal.SIGINT)  # the same one, from a launcher
        stop.noted -= 2
        stop.note(signal.SIGTERM)  # schedulers repeat themselves
        with pytest.raises(KeyboardInterrupt):
            stop.note(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_is_noted_and_means_after_the_training_what_it_did_before(number):
    before = signal.getsignal(number)
    with stop_request(None) as stop:
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert stop.reason == f"{number.name} received"
    assert signal.getsignal(number) == before


def test_a_training_whose_time_is_up_gets_on_by_a_step_at_each_try(tmp_path):
    model, log = tiny_model(), []
    for step in (1, 2, 3):
        stop = out_of_time()
        with pytest.raises(TrainingInterruptedError) as caught:
            run(tmp_path / "c", TinyTask(model), log=log, stop=stop)
        assert str(caught.value) == (
            "tiny: runtime.time_budget_minutes (1e-09) used up: ended with a checkpoint; "
            f"resumes from step {step} of 8 when run again"
        )
    result = run(tmp_path / "c", TinyTask(model), log=log)
    assert result.steps_run == 8


def test_a_finished_training_is_not_ended_early(tmp_path):
    stop = out_of_time()
    result = run(tmp_path / "c", TinyTask(tiny_model()), settings(steps=1), log=[], stop=stop)
    assert result.steps_run == 1


def test_no_checkpoint_falls_between_two_updates_on_the_same_samples(tmp_path):
    task = TinyTask(tiny_model(), iterations=3)
    with pytest.raises(TrainingInterruptedError, match="resumes from step 3 of 8"):
        run(
            tmp_path / "c",
            task,
            settings(),
            log=[],
            checkpoint_every=6,
            stop=out_of_time(),
        )
