"""Ending a training early, on a signal or when its time is up, in a way that it can go on.

Schedulers announce the end of a job by a signal: SLURM sends SIGTERM when a job is cancelled or
preempted, and SIGUSR1 where `--signal` asks for it; Ctrl-C sends SIGINT. During a training such a
signal is only noted. The loop looks at it after each optimiser step, writes a checkpoint and raises
`TrainingInterruptedError`, which ends the process with the exit code 75 (`command.run_stage`).
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

SECONDS_TO_REPEAT = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class TrainingInterruptedError(RuntimeError):
    """A training ended early with a checkpoint; the same command goes on from there."""


class StopRequest:
    """Whether a training is asked to end: by a signal, or by a time budget in minutes."""

    def __init__(self, budget_minutes: float | None = None) -> None:
        self.budget_minutes = budget_minutes
        self.started = time.monotonic()
        self.signal: signal.Signals | None = None
        self.noted = math.inf

    @property
    def reason(self) -> str | None:
        """Why the training is to end now, in words; None where it goes on."""
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
        if speaks():  # not by `print`: a signal may come in the middle of one
            os.write(2, f"{self.signal.name}: ends after this step, with a checkpoint\n".encode())


def speaks() -> bool:
    """Whether this is the process that speaks for a launch of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


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
