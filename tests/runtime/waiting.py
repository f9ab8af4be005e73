"""What a training does between steps, without the training: run by several processes.

    python -m tests.runtime.waiting FOLDER [RANK]

All continue until a signal reaches one of them, and end together with exit code 75. Process RANK
fails instead, which the others are not told.
"""

import signal
import sys
import time
from pathlib import Path

import torch

from latent_reasoning.config import UserError
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.runtime.parallel import join_processes


def main(_: list[str] | None) -> None:
    """Wait for a signal; a file in FOLDER says that this process does."""
    folder, failing = Path(sys.argv[1]), sys.argv[2:]
    processes = join_processes(torch.device("cpu"))
    received = []
    # Only the second process heeds the signal: the first has to hear of it from that one.
    if processes.rank == 1:
        signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    else:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    (folder / f"waiting-{processes.rank}").touch()
    if failing == [str(processes.rank)]:
        raise UserError("row 3 is bad")
    while not processes.any_rank(bool(received)):
        time.sleep(0.02)
    processes.finish()
    sys.exit(75)


if __name__ == "__main__":
    run_stage(main)
