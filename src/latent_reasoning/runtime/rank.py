"""Which process of a launch this one is, as launchers state it in the environment."""

from __future__ import annotations

import os

MEETING = "LATENT_REASONING_MEETING"
"""Names the file in which processes of `launch.py` meet; other launchers name a host."""


def rank() -> int:
    """This process's number among those of its launch; 0 writes, tracks and prints for all."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """The number of processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return process_count() > 1
