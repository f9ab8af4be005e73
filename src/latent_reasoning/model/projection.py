"""A linear module with or without an adapter, in mixed precision.

peft casts the input of an adapter to float32, keeps that for the backward pass, and autocast casts
it back: beside three products, four copies of the activations for each module. Here the input is
in the precision of the products already. The arithmetic is peft's, and so are modules, parameters
and names.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def mixed_precision(states: Tensor) -> torch.dtype | None:
    """The precision in which autocast multiplies `states`; None without it and for float64."""
    device = states.device.type
    if states.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def project(module: nn.Module, inputs: Tensor) -> Tensor:
    """`module(inputs)` under autocast, for `inputs` (.., d) in its precision."""
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return module(inputs)
    result = module.get_base_layer()(inputs)
    for name in module.active_adapters:
        reduced = module.lora_A[name](module.lora_dropout[name](inputs)) * module.scaling[name]
        result = result.add_(module.lora_B[name](reduced))
    return result
