"""Handing signals on from Snakemake to the command that it runs, inside a job of a cluster.

SLURM announces the end of a job by a signal to the process that it started: SIGTERM where the job
is cancelled, preempted or out of time, SIGUSR1 before that where `--signal` asks for it. With
processes tracked by cgroups, as on most clusters, no other process gets it. Here that process is
Snakemake, which dies of SIGUSR1 and answers SIGTERM by waiting for a command that knows nothing.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading

import psutil

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
        for number in reader.recv(64):
            if number in RELAYED:
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
