"""Six states a block of a running model, by hooks on its own modules; and blocks that are skipped.

Each block adds its attention's output and its MLP's output to the stream, each read from the stream
through a norm. Captured are both norms' outputs, both outputs, and the stream after each; besides
the embedding, and what the final norm makes of the last stream. A base whose running sum is not its
stream (parallel blocks, norms after a block's parts) is refused.

B rows, T columns, L blocks, d hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_reasoning.config import UserError
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.state import ReasoningState

PARTS = ("attention_norm", "attention", "attention_stream", "mlp_norm", "mlp", "mlp_stream")
"""A block's six states, in the order in which they are made."""
EMBEDDING, FINAL = "embedding", "final_norm"
_PATHS = (  # norm, attention, its last module, norm, MLP
    ("input_layernorm", "self_attn", "self_attn.o_proj", "post_attention_layernorm", "mlp"),
    ("ln_1", "attn", "attn.c_proj", "ln_2", "mlp"),
)
TOLERANCE = 1e-3
"""Largest error of the running sum against the stream, relative to the stream's largest entry."""


@dataclass(frozen=True)
class Anatomy:
    """The modules of a base, by what they do; lists have an entry a block.

    `heads` are the whole attention modules, `attention` what writes their output.
    """

    final_norm: nn.Module
    attention_norms: list[nn.Module]
    heads: list[nn.Module]
    attention: list[nn.Module]
    mlp_norms: list[nn.Module]
    mlp: list[nn.Module]

    @classmethod
    def of(cls, base: PreTrainedModel) -> Anatomy:
        """Raises `UserError` for a base that is not built in this way."""
        body = base.base_model
        blocks = getattr(body, "layers", getattr(body, "h", None))
        final = getattr(body, "norm", getattr(body, "ln_f", None))
        inside = [dict(block.named_modules()) for block in blocks or ()]
        for paths in _PATHS if inside and final is not None else ():
            if all(path in modules for modules in inside for path in paths):
                parts = ([modules[path] for modules in inside] for path in paths)
                return cls(final, *parts)
        raise UserError(
            f"{type(base).__name__}: its blocks are not norm, attention, norm, MLP, one after the "
            "other, as Llama's, Qwen's and GPT-2's are; its inside cannot be captured"
        )

    @property
    def blocks(self) -> int:
        return len(self.mlp)


@dataclass
class States:
    """What was captured of one forward: each list has an entry (B, T, d) a block."""

    stream: list[Tensor] = field(default_factory=list)
    """Before the first block, where it is the embedding, and after each: L + 1 tensors."""
    attention_norm: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    attention_stream: list[Tensor] = field(default_factory=list)
    mlp_norm: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    final: Tensor | None = None

    def named(self) -> Iterator[tuple[str, int, Tensor]]:
        """Each state with its name and its block, in the order of `names`."""
        attention = (self.attention_norm, self.attention, self.attention_stream)
        blocks = zip(*attention, self.mlp_norm, self.mlp, self.stream[1:], strict=True)
        values = [self.stream[0], *chain.from_iterable(blocks), self.final]
        for (name, block), value in zip(names(len(self.mlp)), values, strict=True):
            yield name, block, value


def names(blocks: int) -> list[tuple[str, int]]:
    """Each state's name and block; the embedding's is -1, the final norm's L."""
    inner = [(part, block) for block in range(blocks) for part in PARTS]
    return [(EMBEDDING, -1), *inner, (FINAL, blocks)]


@contextlib.contextmanager
def captured(base: PreTrainedModel, anatomy: Anatomy) -> Iterator[States]:
    """States of the one forward inside the context."""
    states = States()

    def keep(outputs: list[Tensor], inputs: list[Tensor] | None = None):
        def hook(_, arguments, output):
            outputs.append(output)
            if inputs is not None:
                inputs.append(arguments[0])

        return hook

    def final(_, arguments, output):
        states.stream.append(arguments[0])
        states.final = output

    with contextlib.ExitStack() as stack:
        for modules, hook in (
            (anatomy.attention_norms, keep(states.attention_norm, states.stream)),
            (anatomy.attention, keep(states.attention)),
            (anatomy.mlp_norms, keep(states.mlp_norm, states.attention_stream)),
            (anatomy.mlp, keep(states.mlp)),
            ([anatomy.final_norm], final),
        ):
            for module in modules:
                _hook(stack, module, hook)
        yield states


def _hook(stack: contextlib.ExitStack, module: nn.Module, hook) -> None:
    stack.callback(module.register_forward_hook(hook).remove)


@torch.no_grad()
def read(model: LatentReasoner, inputs: Tensor, mask: Tensor) -> Tensor:
    """Final states (B, T, d) of whole sequences of inputs (B, T, d), in one pass."""
    return model.advance(ReasoningState.empty(mask), inputs, mask)


def capture(model: LatentReasoner, anatomy: Anatomy, inputs: Tensor, mask: Tensor) -> States:
    """The states of whole sequences. Raises `UserError` where the running sum is not the stream."""
    with captured(model.base, anatomy) as states:
        read(model, inputs, mask)
    check_sum(states, mask, type(model.base).__name__)
    return states


def check_sum(states: States, mask: Tensor, name: str) -> None:
    """Compare stream + attention + MLP with the stream that the next block reads."""
    for block, (before, after) in enumerate(pairwise(states.stream)):
        middle = before + states.attention[block]
        error = (middle - states.attention_stream[block])[mask].abs().max()
        error = torch.maximum(error, (middle + states.mlp[block] - after)[mask].abs().max())
        if not error <= TOLERANCE * after[mask].abs().max():  # nan, too
            raise UserError(
                f"{name}: block {block} does not add its attention and its MLP to the stream as "
                f"they are (the sum misses by {float(error):.2g}); its inside cannot be captured"
            )


@contextlib.contextmanager
def skipped(anatomy: Anatomy, block: int, where: Tensor | None = None) -> Iterator[None]:
    """Pass the stream through a block unchanged, at all columns or where `where` (B, T) is True."""

    def hook(_, __, output):
        if where is None:
            return torch.zeros_like(output)
        return output.masked_fill(where.unsqueeze(-1), 0)

    with contextlib.ExitStack() as stack:
        _hook(stack, anatomy.attention[block], hook)
        _hook(stack, anatomy.mlp[block], hook)
        yield


@contextlib.contextmanager
def replayed(anatomy: Anatomy, states: States, blocks: int) -> Iterator[None]:
    """Have the first blocks add what they added in `states`: their products are not made again."""
    with contextlib.ExitStack() as stack:
        for modules, outputs in ((anatomy.attention, states.attention), (anatomy.mlp, states.mlp)):
            for module, output in list(zip(modules, outputs, strict=True))[:blocks]:
                module.forward = lambda *_, output=output, **__: output
                stack.callback(delattr, module, "forward")
        yield


@torch.no_grad()
def attention_weights(
    model: LatentReasoner, anatomy: Anatomy, inputs: Tensor, mask: Tensor
) -> list[Tensor]:
    """The attention (B, H, T, T) of each block, over whole sequences."""
    base, weights = model.base, []
    kept = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        with contextlib.ExitStack() as stack:
            for module in anatomy.heads:
                _hook(stack, module, lambda _, __, output: weights.append(output[1]))
            read(model, inputs, mask)
    finally:
        base.set_attn_implementation(kept)
    return weights
