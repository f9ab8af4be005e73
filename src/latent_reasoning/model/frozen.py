"""Frozen weights held in the precision in which they are multiplied.

Under autocast a product casts its float32 weights, and every pass casts them anew: on a GPU a third
of a latent step, and a copy of the model in memory for each pass whose graph is kept. A weight that
does not change is cast once instead. Products, losses and gradients are the same to the bit.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from latent_reasoning.model.reasoner import LatentReasoner


def hold_frozen(model: LatentReasoner, precision: torch.dtype) -> None:
    """Hold the frozen weights of the blocks' linear modules in `precision`, in place.

    Embeddings and norms stay as they are: they are read in float32. Under an adapter the float32
    weights are kept on the host, because the adapter is merged into them (`restore_frozen`).
    """
    with torch.no_grad():
        for name, module in model.base.base_model.named_modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad or parameter.dtype != torch.float32:
                    continue
                held = parameter.to(precision)
                if model.adapter is not None and held is not parameter:
                    model.adapter.originals[f"{name}.{kind}"] = parameter.detach().cpu()
                parameter.data = held


def restore_frozen(model: LatentReasoner) -> None:
    """Put the weights that were held in less precision back, in place."""
    for name, original in model.adapter.originals.items():
        parameter = model.base.base_model.get_parameter(name)
        parameter.data = original.to(parameter.device)
    model.adapter.originals.clear()
