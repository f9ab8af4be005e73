"""CUDA graphs: what the host gives out once, a GPU repeats without it.

A step of latent reasoning is thousands of small kernels, and to give one out takes the host longer
than the GPU needs for it. Captured as a graph, they are given out together. A captured function
works on the same memory each time: its inputs are copied into tensors of its own, its results are
overwritten by the next run, and neither shapes nor anything else may depend on a tensor's values.

On any other device the function is called anew each time, with the same rules, so that tests can
run what is captured elsewhere.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from latent_reasoning.runtime.device import map_tensors, to_device

T = TypeVar("T")

MOST_GRAPHS = 32
"""Graphs of one function that are kept; inputs of further shapes are worked on without one."""


def bucket(count: int) -> int:
    """The size for `count` things where few sizes are wanted: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, ..

    It is less than half as large again, and above 512 less than an eighth.
    """
    step = 1 << max(0, (count - 1).bit_length() - (2 if count <= 512 else 4))
    return -(-count // step) * step


class Sizes:
    """Sizes that batches are padded to, so that few programs are captured.

    Each kind of size is the largest that was needed so far, as a `bucket`; what needs less than
    half of it gets one of its own.
    """

    def __init__(self) -> None:
        self._largest: dict[tuple[str, ...], int] = {}
        self._place: tuple[str, ...] = ()

    def __call__(self, kind: str, needed: int) -> int:
        """The size of a `kind` of which `needed` are needed."""
        key, size = (*self._place, kind), bucket(needed)
        largest = self._largest[key] = max(size, self._largest.get(key, 0))
        return largest if 2 * size >= largest else size

    @contextlib.contextmanager
    def of(self, place: str) -> Iterator[None]:
        """In this block, sizes are those of a `place`: a micro-batch, a part of it."""
        before = self._place
        self._place = (*before, place)
        try:
            yield
        finally:
            self._place = before


class Captured(Generic[T]):
    """A function without arguments, captured: `run` repeats it.

    `pool` is the memory that it shares with graphs that never run at the same time and whose
    results are not needed any more.
    """

    def __init__(
        self, function: Callable[[], T], device: torch.device, pool: Any | None = None
    ) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            self._capture(pool)

    def run(self) -> T:
        """Do it again; the result of an earlier run may be overwritten."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._result

    def _capture(self, pool: Any | None) -> None:
        generator = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose kernels and workspaces
            self._function()
        torch.cuda.current_stream().wait_stream(stream)
        # Weights that autocast has cast outside would be old ones at the next run.
        torch.clear_autocast_cache()
        with _no_collection(), torch.cuda.graph(self._graph, pool=pool):
            self._result = self._function()
        torch.clear_autocast_cache()
        torch.cuda.set_rng_state(generator)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected in this block: a graph that is freed while another one is captured
    breaks it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Programs(Generic[T]):
    """A function of planned inputs, captured for each of their shapes that is met a second time.

    Its results are tensors, or what holds them, that must be used before the next call.
    `around` is called with each capture, to put right what the runs before it have changed.
    """

    def __init__(
        self,
        function: Callable[[Any], T],
        device: torch.device,
        *,
        around: Callable[[Callable[[], Captured[T]]], Captured[T]] = lambda capture: capture(),
    ) -> None:
        self._function = function
        self._device = device
        self._around = around
        self.clear()

    def __len__(self) -> int:
        return len(self._programs)

    def clear(self) -> None:
        """Forget all programs, and free their memory."""
        self._programs: dict[str, tuple[list[Tensor], Captured[T]]] = {}
        self._seen: set[str] = set()
        # torch does not let a graph into a pool whose graphs are all gone while it has memory.
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def __call__(self, inputs: Any) -> T:
        """The function's result for `inputs`, which are on the host or on the device."""
        given: list[Tensor] = []
        key = signature(inputs, given)
        if key not in self._programs:
            if key not in self._seen or len(self._programs) == MOST_GRAPHS:
                self._seen.add(key)
                return self._function(to_device(inputs, self._device))
            self._programs[key] = self._capture(inputs)
        held, program = self._programs[key]
        for own, tensor in zip(held, given, strict=True):
            own.copy_(tensor, non_blocking=True)
        return program.run()

    def _capture(self, inputs: Any) -> tuple[list[Tensor], Captured[T]]:
        held: list[Tensor] = []

        def hold(tensor: Tensor) -> Tensor:
            held.append(torch.empty_like(tensor, device=self._device).copy_(tensor))
            return held[-1]

        own = map_tensors(inputs, hold)
        return held, self._around(
            lambda: Captured(lambda: self._function(own), self._device, self._pool)
        )


class CapturedParts(dict[str, Any]):
    """What is captured for a model, by purpose; a copy of the model has nothing captured.

    `when` is `runtime.cuda_graphs`, or `always`: what is captured on a GPU then works in the same
    way on any device, given out kernel by kernel.
    """

    when: Literal["auto", "off", "always"] = "auto"

    def wanted_on(self, device: torch.device) -> bool:
        """Whether programs for captures are to be used on a device."""
        return self.when == "always" or (self.when == "auto" and device.type == "cuda")

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedParts:
        parts = CapturedParts()
        parts.when = self.when
        return parts


def signature(value: Any, tensors: list[Tensor]) -> str:
    """All of planned inputs but their tensors' values, as text; appends the tensors to `tensors`.

    Inputs of one signature are worked on by one program.
    """

    def described(tensor: Tensor) -> tuple[Any, ...]:
        tensors.append(tensor)
        return tensor.dtype, *tensor.shape

    return repr(map_tensors(value, described))
