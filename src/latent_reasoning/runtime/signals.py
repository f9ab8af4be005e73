"""Signals: how a stage ends early so that it can resume, and how signals reach it.

- `stop_request`. Schedulers announce the end of a job by a signal: SLURM sends SIGTERM when a job
  is cancelled or preempted, and SIGUSR1 where `--signal` asks for it; Ctrl-C sends SIGINT. During a
  training such a signal is only noted. The loop looks at it after each optimiser step, writes a
  checkpoint and raises `TrainingInterruptedError`, which ends the process with the exit code 75
  (`command.run_stage`).
- `relay_signals`. SLURM signals the process that it started: with processes tracked by cgroups, as
  on most clusters, no other process gets the signal. Here that process is Snakemake, which dies of
  SIGUSR1 and answers SIGTERM by waiting for a command that knows nothing.
- `end_with_workflow`. A stage ends with the Snakemake that started it, also where that one was
  killed outright. Otherwise the next Snakemake would start the stage a second time beside it, in
  the same folders.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType

import psutil

from latent_reasoning.config import UserError
from latent_reasoning.runtime.rank import rank

SECONDS_TO_REPEAT = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class TrainingInterruptedError(UserError, RuntimeError):
    """A training ended early with a checkpoint; the same command resumes from there."""


class StopRequest:
    """Whether a training is asked to end: by a signal, or by a time budget in minutes."""

    def __init__(self, budget_minutes: float | None = None) -> None:
        self.budget_minutes = budget_minutes
        self.started = time.monotonic()
        self.signal: signal.Signals | None = None
        self.noted = math.inf

    @property
    def reason(self) -> str | None:
        """Why the training is to end now, in words; None where it continues."""
        if self.signal is not None:
            return f"{self.signal.name} received"
        minutes = (time.monotonic() - self.started) / 60
        if self.budget_minutes is not None and minutes >= self.budget_minutes:
            return f"runtime.time_budget_minutes ({self.budget_minutes:g}) used up"
        return None

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """Note a signal. Ctrl-C a second time ends at once.

        Not where it is the same one, which a launcher handed on beside the terminal; schedulers
        repeat the other signals.
        """
        now = time.monotonic()
        if number == signal.SIGINT and now - self.noted >= SECONDS_TO_REPEAT:
            raise KeyboardInterrupt
        if self.signal is not None:
            return
        self.signal, self.noted = signal.Signals(number), now
        if rank() == 0:  # not by `print`: a signal may come in the middle of one
            os.write(2, f"{self.signal.name}: ends after this step, with a checkpoint\n".encode())


@contextlib.contextmanager
def stop_request(budget_minutes: float | None) -> Iterator[StopRequest]:
    """Note signals instead of dying of them, and count the time from now on."""
    request = StopRequest(budget_minutes)
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------ from Snakemake to its command

RELAYED = (signal.SIGTERM, signal.SIGUSR1)


def relay_signals() -> None:
    """From now on send SIGTERM and SIGUSR1 to the descendants of this process, too.

    Call it in the main thread. What this process itself does at SIGTERM stays as it is, also where
    a handler is set later: Python writes the number of every signal that it handles to a socket.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    threading.Thread(target=_relay, args=(reader, writer), daemon=True).start()


def _relay(reader: socket.socket, _writer: socket.socket) -> None:
    """Send on what comes; the writing end is held here so that it stays open."""
    while True:
        for number in filter(RELAYED.__contains__, reader.recv(64)):
            send_to(psutil.Process().children(recursive=True), number)


def send_to(processes: Iterable[psutil.Process], number: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


# ---------------------------------------------------------------------------- with its workflow

VARIABLE = "LATENT_REASONING_WORKFLOW"
"""The process id of Snakemake, set by the rules; by hand there is none."""


def end_with_workflow() -> None:
    """From now on send this process SIGTERM once its Snakemake is gone (on Linux).

    A training answers SIGTERM with a checkpoint; every other stage just ends.
    """
    workflow = os.environ.get(VARIABLE, "")
    # In a process namespace of its own, a shell's parent is process 0 or 1, which stays.
    if workflow.isdecimal() and int(workflow) > 1 and hasattr(os, "pidfd_open"):
        threading.Thread(target=_watch, args=(int(workflow),), daemon=True).start()


def _watch(workflow: int) -> None:
    try:
        descriptor = os.pidfd_open(workflow)
    except ProcessLookupError:
        pass  # it went while this process was still importing
    except OSError:
        return  # not allowed or not known here
    else:
        select.select([descriptor], [], [])
    print("Snakemake is gone: ending too; start it again to resume", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
