"""A stand-in for a GPU: torch's `meta` device, whose tensors have shapes and no values.

A program that runs on it decides nothing by what a tensor holds, so that on a GPU the host never
waits for it and it may be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_reasoning.runtime.device import to_device

META = torch.device("meta")

WAITS = {
    "_local_scalar_dense": "reads a number",
    "equal": "compares to a bool",
    "nonzero": "has a shape that depends on values",
    "masked_select": "has a shape that depends on values",
    "unique_dim": "has a shape that depends on values",
    "_unique2": "has a shape that depends on values",
    "unique_consecutive": "has a shape that depends on values",
    "bincount": "has a shape that depends on values",
    "repeat_interleave": "has a shape that depends on values",
}
"""Operations for which the host waits, by name, with the reason."""


class _Refuses(TorchDispatchMode):
    """Refuses what waits for the device or copies between devices."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if name in WAITS and (name != "repeat_interleave" or function._overloadname != "self_int"):
            raise AssertionError(f"{function} {WAITS[name]}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [leaf for leaf in tree_leaves(arguments[1]) if isinstance(leaf, Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                raise AssertionError(f"{function} with a mask has a shape that depends on values")
        result = function(*arguments, **(keywords or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in given + made}
        # A number taken into an operation is a tensor of no dimension on the host: no copy.
        if any(t.ndim and t.device.type != "meta" for t in given + made):
            raise AssertionError(f"{function} works on {sorted(devices)}")
        return result


class _RefusesNumbers(TorchFunctionMode):
    """Refuses tensors made of numbers that the host has: a copy, which no capture allows."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        on_device = torch.device(keywords.get("device") or "cpu") == META
        if function is torch.tensor and on_device and arguments[0] != []:  # nothing to copy
            raise AssertionError("torch.tensor copies numbers of the host")
        return function(*arguments, **keywords)


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Refuse, forward and backward, whatever waits for the device or is not on it."""
    with _Refuses(), _RefusesNumbers():
        yield


def on_meta(value):
    """What a plan holds, on the stand-in."""
    return to_device(value, META)
