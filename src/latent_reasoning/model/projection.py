"""Linear modules with or without adapters, in mixed precision.

peft casts the input of an adapter to float32, keeps that for the backward pass, and autocast casts
it back; outputs are scaled and added in passes of their own. Here the input is in the precision of
the products already, products add to what is there, and modules that read the same states share
what they can. Modules, parameters, names and arithmetic are peft's, but for one thing: with
dropout, the adapters of such modules see the same noise.

M positions, d inputs, r rank, g modules that read the same states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

Casts = dict[tuple[Tensor, ...], Tensor]

_casts: ContextVar[Casts | None] = ContextVar("casts", default=None)


def mixed_precision(states: Tensor) -> torch.dtype | None:
    """The precision in which autocast multiplies `states`; None without it and for float64."""
    device = states.device.type
    if states.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@contextlib.contextmanager
def weights_cast_once() -> Iterator[None]:
    """Weights of adapters, which do not change in this block, are cast once in it."""
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def project(modules: Sequence[nn.Module], inputs: Tensor) -> list[Tensor]:
    """The output of each of `modules` for `inputs` (.., d), as autocast multiplies."""
    if not _have_like_adapters(modules):
        return [module(inputs) for module in modules]
    adapters: Sequence[Any] = modules
    (name,) = adapters[0].active_adapters
    low, dropout = mixed_precision(inputs) or inputs.dtype, adapters[0].lora_dropout[name]
    outputs = _Adapted.apply(
        inputs.flatten(0, -2).to(low),
        dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        adapters[0].scaling[name],
        _cast(low, *(module.lora_A[name].weight for module in adapters)),
        *(_cast(low, module.get_base_layer().weight) for module in adapters),
        *(_cast(low, module.lora_B[name].weight) for module in adapters),
    )
    return [output.view(*inputs.shape[:-1], output.shape[1]) for output in outputs]


def _have_like_adapters(modules: Sequence[nn.Module]) -> bool:
    """Whether all have one plain adapter of the same kind, over weights that are not trained."""
    kinds = set()
    for module in modules:
        if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
            return False
        base, names = module.get_base_layer(), module.active_adapters
        if not isinstance(base, nn.Linear) or base.bias is not None or base.weight.requires_grad:
            return False
        if len(names) != 1 or names[0] in module.lora_variant or module.lora_bias[names[0]]:
            return False
        dropout = module.lora_dropout[names[0]]
        kinds.add((names[0], module.r[names[0]], module.scaling[names[0]], str(dropout)))
    return len(kinds) == 1


def _cast(low: torch.dtype, *weights: Tensor) -> Tensor:
    """`weights` one below the other, in `low` precision."""
    casts = _casts.get()
    if casts is not None and weights in casts:
        return casts[weights]
    cast = torch.cat([weight.to(low) for weight in weights]) if weights[1:] else weights[0].to(low)
    if casts is not None:
        casts[weights] = cast
    return cast


class _Adapted(torch.autograd.Function):
    """x W_i^T + scaling dropout(x) A_i^T B_i^T for each of g modules.

    `inputs` is x (M, d), `first` the A_i one below the other (g r, d), `matrices` are the W_i and
    then the B_i (.., r).
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, dropout: float, scaling: float, first: Tensor, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        noisy, kept = inputs, None
        if dropout:
            noisy, kept = torch.native_dropout(inputs, dropout, True)
        reduced = noisy @ first.T
        count = len(matrices) // 2
        outputs = []
        parts = reduced.chunk(count, 1)
        for weight, second, part in zip(matrices, matrices[count:], parts, strict=False):
            outputs.append((inputs @ weight.T).addmm_(part, second.T, alpha=scaling))
        ctx.dropout, ctx.scaling = dropout, scaling
        ctx.save_for_backward(noisy, kept, reduced, first, *matrices)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        noisy, kept, reduced, first, *matrices = ctx.saved_tensors
        count, scaling = len(upstream), ctx.scaling
        weights, seconds = matrices[:count], matrices[count:]
        by_reduced = torch.empty_like(reduced)
        by_seconds, by_inputs = [], None
        for gradient, weight, second, part, own in zip(
            upstream,
            weights,
            seconds,
            reduced.chunk(count, 1),
            by_reduced.chunk(count, 1),
            strict=True,
        ):
            by_inputs = (
                gradient @ weight if by_inputs is None else by_inputs.addmm_(gradient, weight)
            )
            own.addmm_(gradient, second, beta=0, alpha=scaling)
            by_second = torch.empty_like(second)
            by_seconds.append(by_second.addmm_(gradient.T, part, beta=0, alpha=scaling))
        by_first = by_reduced.T @ noisy
        if kept is None:
            by_inputs.addmm_(by_reduced, first)
        else:
            by_inputs.addcmul_(by_reduced @ first, kept, value=1 / (1 - ctx.dropout))
        return by_inputs, None, None, by_first, *[None] * count, *by_seconds
