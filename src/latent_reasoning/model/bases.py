"""What base models do in their own way, and which of them can be used at all (docs/bases.md).

Everything that the latent forward has to know of an architecture is here: how it scales its
embeddings and its logits, how many positions it has, which tensors of its old files are no weights,
and what makes it unusable. Whether a base keeps to it is tried in `self_check.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from latent_reasoning.config import UserError

CHOOSE = "choose another base model (docs/bases.md lists those that work)"

USABLE_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers in a model's config that keep keys and values of every token."""

MASK_BUFFERS = re.compile(
    r"(^|\.)(attn|attention|self_attn|self_attention)\.(attention\.)?(bias|masked_bias|causal_mask)$"
    r"|\.inv_freq$|\.embed_positions(\.weights)?$"
)
"""Names of masks and tables that older versions of transformers saved among the weights."""

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Keys of a `config.json` that choose a kernel, possibly one that is not installed here."""


class UnsupportedBaseError(UserError, ValueError):
    """A base model cannot be used; the message says why."""


def check_config(config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedBaseError` for a `config.json` whose model would not be read right."""
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        raise UnsupportedBaseError(
            f"the weights are quantised ({method}), and are neither trained nor merged in that "
            "form; use the folder of the unquantised model, or a GGUF file (base.source: gguf)"
        )
    if config.get("is_encoder_decoder"):
        raise UnsupportedBaseError(
            f"{config.get('model_type')} is an encoder-decoder, not a causal language model; "
            + CHOOSE
        )


def check_supported(base: PreTrainedModel) -> None:
    """Raise `UnsupportedBaseError` where latent steps cannot be taken with `base`."""
    name, config = type(base).__name__, base.config
    if config.get_text_config() is not config:
        raise UnsupportedBaseError(
            f"{name} reads more than text; save its language model alone as a folder, or {CHOOSE}"
        )
    others = set(getattr(config, "layer_types", None) or ()) - USABLE_LAYERS
    if others or getattr(base, "_is_stateful", False):
        kinds = f" ({', '.join(sorted(others))})" if others else ""
        raise UnsupportedBaseError(
            f"{name} has layers that keep no keys and values of every token{kinds}, which latent "
            f"reasoning builds on; {CHOOSE}"
        )
    if base.base_model is base or base.get_output_embeddings() is None:
        raise UnsupportedBaseError(f"{name} is not a body with an output matrix on top; {CHOOSE}")


def position_limit(base: PreTrainedModel) -> int | None:
    """The number of positions that `base` has, None where rotation or bias has no end.

    A table of positions ends. A rotation ends where it changes with the length of the text
    (`dynamic` and `longrope`): the keys of earlier tokens were turned by another one.
    """
    config = base.config
    rope = getattr(config, "rope_parameters", None) or {}
    changes = [
        limit
        for part in (rope, *rope.values())
        if isinstance(part, Mapping) and (limit := _rotation_changes_after(config, part))
    ]
    if changes:
        return min(changes)
    if any("rotary" in name for name, _ in base.named_modules()):
        return None
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def _rotation_changes_after(config: PreTrainedConfig, rope: Mapping[str, Any]) -> int | None:
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings")
    return config.max_position_embeddings if rope.get("rope_type") == "dynamic" else None


def check_length(base: PreTrainedModel, limit: int, tokens: int) -> None:
    """Raise `UserError` where a row of `tokens` does not fit into `limit` positions."""
    if tokens > limit:
        raise UserError(
            f"a row of {tokens} tokens is longer than {type(base).__name__} can read, which has "
            f"{limit} positions; shorten the text or leave it out"
        )


def scaled_rows(base: PreTrainedModel, rows: Tensor) -> Tensor:
    """Rows `(.., d)` of the input matrix as the embedding module gives them: some scale them."""
    scale = getattr(base.get_input_embeddings(), "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def adjusts_logits(base: PreTrainedModel) -> bool:
    """Whether `adjusted_logits` changes anything."""
    factors = (getattr(base.config, name, None) for name in ("logit_scale", "logits_scaling"))
    scaled = any(factor is not None and factor != 1 for factor in factors)
    return scaled or getattr(base.config, "final_logit_softcapping", None) is not None


def adjusted_logits(base: PreTrainedModel, logits: Tensor) -> Tensor:
    """Products with the output matrix -> logits: Cohere and Granite scale them, Gemma 2 caps them.

    Stop logits and the vocabulary's are adjusted alike.
    """
    config = base.config
    factor = getattr(config, "logit_scale", None)
    if factor is not None and factor != 1:
        logits = logits * factor
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None and divisor != 1:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def without_mask_buffers(names: Iterable[str]) -> list[str]:
    """Names of tensors, without those that are no weights."""
    return [name for name in names if not MASK_BUFFERS.search(name)]


def experts_in_one_tensor(base: PreTrainedModel) -> dict[str, str]:
    """Weights of all experts in one tensor, which LoRA does not reach: part of a name -> full name.

    `experts.gate_up_proj` is found as `gate`, `up` and `proj`.
    """
    found: dict[str, str] = {}
    for name, parameter in base.base_model.named_parameters():
        if parameter.ndim == 3 and "conv" not in name:
            for part in name.rsplit(".", 1)[-1].split("_"):
                found.setdefault(part, name)
    return found
