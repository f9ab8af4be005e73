"""What a block does between its products in mixed precision, apart or fused by `torch.compile`.

Norms, rotations and gates are a handful of operations on every number of a pass. Fused, each is one
kernel forward and one or two backward. Compiled once for all shapes, they take some seconds at the
first step.

R rows, W columns, d hidden size, H heads of size s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def normed(hidden: Tensor, weight: Tensor, epsilon: float, low: torch.dtype) -> Tensor:
    """RMS norm of states (R, W, d), in `low` precision."""
    return functional.rms_norm(hidden, weight.shape, weight.to(hidden.dtype), epsilon).to(low)


def rotated(states: Tensor, cos: Tensor, sin: Tensor, low: torch.dtype) -> Tensor:
    """Rotary position embedding of (R, H, W, s), in `low` precision: products of keys and queries
    are in it in any case. The first half of the sines is negated."""
    left, right = states.chunk(2, -1)
    return torch.addcmul(states * cos, torch.cat([right, left], -1), sin).to(low)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of `gate`, times `up`."""
    return functional.silu(gate) * up


class Elementwise(NamedTuple):
    """The three operations."""

    normed: Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
    rotated: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]


APART = Elementwise(normed, rotated, gated)


@lru_cache
def fused() -> Elementwise:
    """The same, compiled; once more for single columns, for gradients, for each precision."""
    from torch._dynamo import config

    config.recompile_limit = max(32, config.recompile_limit)
    return Elementwise(*(torch.compile(operation, dynamic=True) for operation in APART))
