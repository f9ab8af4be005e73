"""What a training stage takes of its machine: a GPU, other processes, threads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from latent_reasoning.config import Runtime
from latent_reasoning.runtime.device import resolve_device, set_threads
from latent_reasoning.runtime.gpus import take_gpus
from latent_reasoning.runtime.parallel import OneProcess, join_processes


class Machine(NamedTuple):
    """The device of this process, and the processes that it trains with."""

    device: torch.device
    processes: OneProcess


def join_machine(runtime: Runtime) -> Machine:
    """Wait for a free GPU and hold it, meet the processes of this launch, fix torch's threads.

    Call it once in a process, before the first use of CUDA. Raises `ConfigError`, `GpuSlotError` or
    `ParallelError` if the machine lacks what `runtime` asks for.
    """
    take_gpus(runtime.device)
    device = resolve_device(runtime.device)
    processes = join_processes(device)
    set_threads(runtime.threads)
    return Machine(device, processes)
