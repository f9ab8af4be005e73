"""The processes that train one model together, one GPU (or CPU process) each.

Data parallel, with the step of one process: the micro-batches of a step are distributed over the
processes, and gradients, weights and metrics are summed before every process clips and takes the
same optimiser step. What a step computes thus depends on its micro-batches, not on the number of
processes. Two things do differ from one process: the order in which numbers are added, and the
dropout masks, which each process draws for its own rows.

A launcher starts the processes (`launch.py`) and `join_processes` joins them. Its result is passed
to whoever needs it; a process that trains alone has `ALONE`, so that no caller has to ask.

`DistributedDataParallel` is not used: its hooks want one forward through the wrapper, but a latent
forward calls the model many times, an RL update goes through the graph of sampling, and the weight
of a micro-batch is known only when all are done. Overlapping communication with the backward pass,
which is what it would add, saves little here: a latent chain's gradients are complete only at the
very end of the backward pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from latent_reasoning.config import UserError
from latent_reasoning.runtime.files import first_line
from latent_reasoning.runtime.rank import MEETING, launched, process_count, rank

LONGEST_WAIT = datetime.timedelta(hours=6)
"""For what the first process does alone, such as a frozen teacher's states. When a process dies,
its launcher ends the others at once."""
BUCKET = 32 * 2**20
"""Bytes of gradients that are summed at once: a sum costs a fraction of a millisecond, whatever its
size. They are copied for it, into far less memory than the backward pass has just freed."""
PR_SET_PDEATHSIG = 1


class ParallelError(UserError, RuntimeError):
    """Processes that cannot work together, or no longer can."""


class OneProcess:
    """A process that trains alone; `SeveralProcesses` has the same methods for several."""

    rank = 0
    count = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files, tracks and prints."""
        return self.rank == 0

    def purpose(self, name: str) -> str:
        """`name` as the purpose of a seed that must differ between processes (dropout)."""
        return name if self.is_main else f"{name} process {self.rank}"

    def share(self, items: Sequence[Any]) -> list[Any]:
        """This process's part of `items`; the parts of all processes hold each item once."""
        return list(items[self.rank :: self.count])

    def share_size(self, size: int) -> int:
        """The largest part size, of `size` items, that still gives every process a part."""
        largest = -(-size // self.count)
        for_each = -(-size // largest) >= self.count
        return largest if for_each else max(1, size // self.count)

    def gather(self, own: list[Any]) -> list[Any]:
        """The results of all processes' shares, in the order of the items, on each process."""
        return own

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on any process: all get the same answer, so that all act alike."""
        return flag

    def print(self, line: str) -> None:
        """Print a line to stderr at once, in the first process only."""
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes."""

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the values of the first."""

    def wait(self) -> None:
        """Wait until all processes have called this."""

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process run the block alone, then the others."""
        yield

    def finish(self) -> None:
        """Wait for all processes, then end their communication."""


class SeveralProcesses(OneProcess):
    """The processes of one launch; all of them must call a method that communicates."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def meet(self, backend: str) -> None:
        """Open the communication; the other methods that communicate need it."""
        with self._together():
            distributed.init_process_group(
                backend,
                init_method=f"file://{os.environ[MEETING]}" if MEETING in os.environ else "env://",
                rank=self.rank,
                world_size=self.count,
                timeout=LONGEST_WAIT,
            )

    def gather(self, own: list[Any]) -> list[Any]:
        lists: list[list[Any]] = [[] for _ in range(self.count)]
        with self._together():
            distributed.all_gather_object(lists, own)
        total = sum(len(part) for part in lists)
        return [lists[index % self.count][index // self.count] for index in range(total)]

    def any_rank(self, flag: bool) -> bool:
        return bool(self._maximum([int(flag)])[0])

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        # A process whose rows did not reach a parameter has no gradient for it; others may.
        reached = self._maximum([int(parameter.grad is not None) for parameter in parameters])
        learning = [p for p, used in zip(parameters, reached, strict=True) if used]
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for gradients in _buckets([parameter.grad for parameter in learning]):
            parts = [gradient.flatten() for gradient in gradients]
            together = parts[0] if len(parts) == 1 else torch.cat(parts)
            with self._together():
                distributed.all_reduce(together)
            sums = together.split([part.numel() for part in parts])
            for gradient, part in zip(gradients, sums, strict=True):
                gradient.copy_(part.view_as(gradient))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        with self._together():
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), src=0)

    def wait(self) -> None:
        # Not `barrier`, which would go through the GPU; this stays on the CPU.
        self._maximum([0])

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def finish(self) -> None:
        self.wait()
        distributed.destroy_process_group()

    def _maximum(self, numbers: list[int]) -> list[int]:
        """The largest of each number over the processes."""
        tensor = torch.tensor(numbers)
        with self._together():
            distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return tensor.tolist()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Raise `ParallelError` if communication in the block fails because a process is gone."""
        try:
            yield
        except RuntimeError as error:
            raise ParallelError(
                f"process {self.rank} of {self.count} lost the others, whose own messages say why: "
                f"{first_line(error)}"
            ) from None


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, cut into lists of one type that are sent together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        size += tensor.nbytes
        if bucket and (size > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], tensor.nbytes
        bucket.append(tensor)
    if bucket:
        yield bucket


ALONE = OneProcess()
"""What `join_processes` returns if no launcher started this process."""


def join_processes(device: torch.device) -> OneProcess:
    """Join the processes of this launch, if it has several; `cuda` then means this one's GPU.

    Call it once in a process. Raises `ParallelError` if there are fewer GPUs than processes.
    """
    if not launched():
        return ALONE
    _die_with_the_launcher()
    local_rank, on_this_host = (int(os.environ[k]) for k in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cpu = device.type == "cpu"
    if not cpu and torch.cuda.device_count() < on_this_host:
        raise ParallelError(
            f"{on_this_host} processes were started, but torch sees {torch.cuda.device_count()} "
            "GPUs: lower runtime.processes"
        )
    if not cpu:
        torch.cuda.set_device(local_rank)
    processes = SeveralProcesses(rank(), process_count())
    processes.meet("gloo" if cpu else "cuda:nccl,cpu:gloo")
    return processes


def _die_with_the_launcher() -> None:
    """Have the kernel, if it is Linux, end this process when its launcher is killed."""
    launcher = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        raise ParallelError("the launcher of this process is gone")
