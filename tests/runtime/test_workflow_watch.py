"""A stage ends with the Snakemake that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from latent_reasoning.runtime.signals import VARIABLE

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux alone has pidfd")
STAGE = """
import time
from latent_reasoning.runtime.signals import end_with_workflow
end_with_workflow()
print("runs", flush=True)
time.sleep(60)
"""


def start(workflow: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STAGE],
        env={**os.environ, VARIABLE: workflow},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_stage_gets_sigterm_once_its_snakemake_is_gone():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as workflow:
        with start(str(workflow.pid)) as stage:
            assert stage.stdout.readline() == "runs\n"
            assert stage.poll() is None
            workflow.send_signal(signal.SIGKILL)
            assert stage.wait(30) == -signal.SIGTERM
            assert "Snakemake is gone" in stage.stderr.read()


def test_a_stage_that_comes_too_late_ends_too():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with start(str(gone.pid)) as stage:
        assert stage.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize("workflow", ["", "0", "1", "none"])
def test_by_hand_nothing_is_watched(workflow):
    with start(workflow) as stage:
        assert stage.stdout.readline() == "runs\n"
        time.sleep(0.2)
        assert stage.poll() is None
        stage.kill()
