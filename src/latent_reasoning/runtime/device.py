"""What a process takes of its machine: device, precision, threads, the processes beside it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from latent_reasoning.config import ConfigError, Runtime
from latent_reasoning.runtime.gpus import take_gpus
from latent_reasoning.runtime.parallel import OneProcess, join_processes

T = TypeVar("T")


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
    torch.set_num_threads(runtime.threads)
    return Machine(device, processes)


def resolve_device(name: str = "auto") -> torch.device:
    """`auto`: cuda if there is a GPU, else cpu. Raises `ConfigError` for cuda without a GPU.

    From then on no attention is cuDNN's, which torch prefers on an H100: it plans for each new
    shape, for up to a second, and its gradients of masked rows can be NaN (pytorch issue 196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device: cuda was asked for, but torch sees no GPU; use auto")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def held_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision in which weights that never change are held: float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else resolve_precision(name, device)


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision unless `precision` is float32; weights that are trained stay float32."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


@dataclasses.dataclass(frozen=True)
class HostTensor:
    """A tensor that stays on the host when what holds it is moved."""

    tensor: Tensor = dataclasses.field(repr=False)


def to_device(value: T, device: torch.device) -> T:
    """The same tensors on `device`, copied without waiting for what runs there.

    `value` is a tensor, a frozen dataclass, list, tuple or dict of such, or anything else, which
    stays as it is.
    """
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def page_locked(value: T) -> T:
    """The same tensors in page-locked memory, so that copies to a GPU do not block the host."""
    return map_tensors(value, Tensor.pin_memory)


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same with `function` of each tensor in its place; `value` is as in `to_device`."""

    def mapped(part: Any) -> Any:
        return map_tensors(part, function)

    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, HostTensor | type):
        return value
    if dataclasses.is_dataclass(value):
        holder: Any = value
        names = (field.name for field in dataclasses.fields(holder))
        return dataclasses.replace(holder, **{name: mapped(getattr(value, name)) for name in names})
    if isinstance(value, dict):
        return {key: mapped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = map(mapped, value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
