"""Running out of memory, and doing the same work in smaller pieces.

An error of torch's allocators (on the GPU or the CPU) is recognised, unused memory is freed, and
the caller tries again with half as much at a time: the training loop with half the micro-batch,
generation with half the batch.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from latent_reasoning.config import UserError
from latent_reasoning.runtime.files import first_line
from latent_reasoning.runtime.parallel import OneProcess

MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What CUDA, torch's CPU allocator and cuBLAS say, in lower case."""

T = TypeVar("T")
U = TypeVar("U")


class OutOfMemoryError(UserError, RuntimeError):
    """There is not enough memory, on this process's device or on that of another one."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, or was raised while such an error was on
    its way: where memory ends in the capture of a CUDA graph, torch reports the broken capture."""
    if isinstance(error, MemoryError | OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text, before = str(error).lower(), error.__context__
    return any(message in text for message in MESSAGES) or (
        before is not None and is_out_of_memory(before)
    )


@contextlib.contextmanager
def memory_shortage(processes: OneProcess) -> Iterator[None]:
    """Raise `OutOfMemoryError` on every process if the block runs out of memory on any of them.

    All `processes` must enter the block, and the same number of such blocks inside it.
    """
    reason = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    if processes.any_rank(reason is not None):
        raise OutOfMemoryError(reason or "another process ran out of memory") from None


def release() -> None:
    """Free memory after a failure. Call it outside `except`: the traceback keeps tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_halves(run: Callable[[Sequence[T]], list[U]], items: Sequence[T]) -> list[U]:
    """`run(items)`, or if memory does not suffice, the results of both halves, run one by one.

    Raises `OutOfMemoryError` if a single item is too much.
    """
    try:
        return run(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    release()
    if len(items) == 1:
        raise OutOfMemoryError(f"out of memory with a single prompt ({reason})")
    half = len(items) // 2
    _warn(len(items), half, reason)
    return in_halves(run, items[:half]) + in_halves(run, items[half:])


def in_fewer_rows(run: Callable[[int], T], rows: int, forget: Callable[[], None]) -> T:
    """`run(rows)`, or with half as many rows at a time for as long as memory does not suffice.

    `forget` drops what an attempt has left. Raises `OutOfMemoryError` if a single row is too much.
    """
    while True:
        try:
            return run(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        forget()
        release()
        if rows == 1:
            raise OutOfMemoryError(f"out of memory with a single prompt ({reason})")
        _warn(rows, rows // 2, reason)
        rows //= 2


def _warn(rows: int, half: int, reason: str) -> None:
    print(
        f"warning: out of memory with {rows} prompts at a time, continues with {half}; lower "
        f"runtime.evaluation_batch_size ({reason})",
        file=sys.stderr,
        flush=True,
    )
