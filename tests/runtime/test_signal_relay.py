"""A signal to a job's Snakemake reaches the command that it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

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
