"""Signals between Snakemake and the stages that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from latent_reasoning.runtime.signals import VARIABLE

needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux alone has pidfd")
# Stands in for Snakemake: its own handler comes after the relay's.
PARENT = """
import signal, subprocess, sys
from latent_reasoning.runtime.signals import relay_signals
relay_signals()
signal.signal(signal.SIGTERM, lambda *_: print("parent: told", flush=True))
child = subprocess.Popen(["bash", "-c", "true; exec " + sys.argv[1]])
print("parent:", child.wait(), flush=True)
"""
CHILD = """
import signal, sys, time
def end(number, _): print("child:", signal.Signals(number).name, flush=True); sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1): signal.signal(number, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGUSR1, {"child: SIGUSR1", "parent: 75"}),
        (signal.SIGTERM, {"child: SIGTERM", "parent: 75", "parent: told"}),
    ],
)
def test_a_signal_to_the_parent_reaches_the_child_which_ends_by_itself(number, said, tmp_path):
    child = tmp_path / "child.py"
    child.write_text(CHILD, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, f"{sys.executable} {child}"],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        os.kill(parent.pid, number)
        assert set(parent.stdout.read().splitlines()) == said
    assert parent.returncode == 0


# ---------------------------------------------------------------- a stage ends with its Snakemake

STAGE = """
import time
from latent_reasoning.runtime.signals import end_with_workflow
end_with_workflow()
print("runs", flush=True)
time.sleep(60)
"""


def stage(workflow: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STAGE],
        env={**os.environ, VARIABLE: workflow},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_pidfd
def test_a_stage_gets_sigterm_once_its_snakemake_is_gone():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as workflow:
        with stage(str(workflow.pid)) as started:
            assert started.stdout.readline() == "runs\n"
            assert started.poll() is None
            workflow.send_signal(signal.SIGKILL)
            assert started.wait(30) == -signal.SIGTERM
            assert "Snakemake is gone" in started.stderr.read()


@needs_pidfd
def test_a_stage_that_comes_too_late_ends_too():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with stage(str(gone.pid)) as started:
        assert started.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize("workflow", ["", "0", "1", "none"])
def test_by_hand_nothing_is_watched(workflow):
    with stage(workflow) as started:
        assert started.stdout.readline() == "runs\n"
        time.sleep(0.2)
        assert started.poll() is None
        started.kill()
