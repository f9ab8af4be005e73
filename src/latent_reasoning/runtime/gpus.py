"""Which GPUs a job uses when several jobs share a host: a file lock for each GPU.

A job takes a free GPU for each of its processes and shows them to CUDA through
CUDA_VISIBLE_DEVICES; the kernel releases the locks when the job ends, however it ends. It chooses
among the GPUs that CUDA_VISIBLE_DEVICES allows, and locks none that SLURM assigned to it alone.

The locks lie on the host itself, one folder per user: in `/tmp` and not $TMPDIR, which may differ
between two sessions or lie on a network disk, and would hide the locks of one from the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from latent_reasoning.config import UserError
from latent_reasoning.runtime.files import try_lock
from latent_reasoning.runtime.rank import launched

VISIBLE = "CUDA_VISIBLE_DEVICES"
TAKEN = "LATENT_REASONING_GPU_SLOTS"
"""Set once a process holds its locks: for itself, and for the processes that it launches."""
SLURM_ASSIGNED = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
POLL_SECONDS = 2.0


class GpuSlotError(UserError, RuntimeError):
    """The GPUs that a job needs are not there."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name for CUDA (an index or a UUID), and by the name of its lock."""

    name: str
    slot: str


def lock_folder() -> Path:
    """Where this user's locks lie on this host."""
    return Path("/tmp") / f"latent-reasoning-gpus-{os.getuid()}"


def take_gpus(device: str, count: int = 1, folder: Path | None = None) -> list[str]:
    """Wait for `count` free GPUs, hide all others from this process, and hold them until it ends.

    `device` is `runtime.device`. Nothing is taken for `cpu`, on a host without NVIDIA GPUs, by the
    processes of a launcher, a second time, or if SLURM assigned no more than `count`. Call it
    before the first use of CUDA. Returns the names taken. Raises `GpuSlotError` if the host has
    fewer.
    """
    if device == "cpu" or launched() or TAKEN in os.environ:
        return []
    gpus = visible_gpus()
    by_slurm = any(os.environ.get(name) for name in SLURM_ASSIGNED)
    if not gpus or (by_slurm and len(gpus) <= count):
        return []
    if len(gpus) < count:
        raise GpuSlotError(
            f"runtime.processes: {count} of them need a GPU each, but this host shows {len(gpus)}; "
            "lower it"
        )
    folder = _own_folder(folder or lock_folder())
    taken = _wait_for(gpus, count, folder)
    names = [gpu.name for gpu in taken]
    os.environ[VISIBLE] = os.environ[TAKEN] = ",".join(names)
    return names


def visible_gpus() -> list[Gpu]:
    """This host's NVIDIA GPUs that CUDA_VISIBLE_DEVICES allows.

    `nvidia-smi` lists them: asking CUDA would fix the choice before it is made.
    """
    listed = _listed_uuids()
    allowed = os.environ.get(VISIBLE)
    if allowed is None:
        return [Gpu(uuid, uuid) for uuid in listed]
    gpus = []
    for entry in filter(None, (part.strip() for part in allowed.split(","))):
        if entry.isdigit():
            slot = listed[int(entry)] if int(entry) < len(listed) else None
        elif entry.startswith("MIG-"):
            slot = entry
        else:
            slot = next((uuid for uuid in listed if uuid.startswith(entry)), None)
        if slot is None:
            break  # as in CUDA: entries after an unknown one are ignored
        gpus.append(Gpu(entry, slot))
    return gpus


def _listed_uuids() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]


def _own_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise GpuSlotError(f"{folder} holds the locks of GPUs, but belongs to another user")
    return folder


def _wait_for(gpus: list[Gpu], count: int, folder: Path) -> list[Gpu]:
    started = time.monotonic()
    taken = _take_now(gpus, count, folder)
    if taken:
        return taken
    owners = ", ".join(_lock(gpu, folder).read_text() or "nobody" for gpu in gpus)
    _say(f"waiting for {count} of {len(gpus)} GPUs; taken by {owners}; locks in {folder}")
    while not taken:
        time.sleep(POLL_SECONDS)
        taken = _take_now(gpus, count, folder)
    _say(f"took a GPU after {time.monotonic() - started:.0f} seconds")
    return taken


def _take_now(gpus: list[Gpu], count: int, folder: Path) -> list[Gpu]:
    """Take all `count` at once or none: two jobs that each hold half would wait for ever."""
    locks: dict[Gpu, int] = {}
    for gpu in gpus:
        lock = try_lock(_lock(gpu, folder), f"process {os.getpid()}")
        if lock is not None:
            locks[gpu] = lock
        if len(locks) == count:
            return list(locks)
    for lock in locks.values():
        os.close(lock)
    return []


def _lock(gpu: Gpu, folder: Path) -> Path:
    return folder / f"{gpu.slot}.lock"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
