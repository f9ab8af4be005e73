"""Device, precision and threads of one process."""

from __future__ import annotations

import contextlib

import torch

from latent_reasoning.config import ConfigError


def resolve_device(name: str = "auto") -> torch.device:
    """`auto`: cuda if there is a GPU, else cpu. Raises `ConfigError` for cuda without a GPU."""
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


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision unless `precision` is float32; the weights themselves stay float32."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)


def set_threads(threads: int) -> None:
    """Fix the number of torch's threads, which decides the order of sums and so the result."""
    torch.set_num_threads(threads)
