"""The base model's blocks, run on top of a growing cache.

Beside its arithmetic, a call of a transformers model of four blocks spends 2 ms on masks, cache
classes and decorators: most of the time of a latent step or a written token. For Llama models the
same modules (adapters included) are therefore called one after the other here, and rows that
continue the same text attend to its keys and values without copying them (`SharedPrefix`). Every
other architecture is run by transformers itself. Both ways give the same states
(`tests/model/test_blocks.py`).

R rows, W new columns, K columns of each row's own, P shared texts of K_p columns, H heads of size s
over G groups of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel

from latent_reasoning.model.cache import GrowingCache, StaticCache
from latent_reasoning.model.elementwise import APART, Elementwise, fused
from latent_reasoning.model.packing import Packing
from latent_reasoning.model.projection import mixed_precision, project
from latent_reasoning.runtime.device import HostTensor, to_device
from latent_reasoning.runtime.graphs import Sizes


@dataclass(frozen=True)
class RowOrder:
    """How rows that continue P texts are arranged by their texts: row i continues text `rows[i]`.

    Each text has S = `most` slots, enough for the text with the most rows: `slots` (P * S,) holds
    the row in each slot (row 0 in unused ones), `places` (R,) the slot of each row; both are None
    where the rows are in this order already.
    """

    rows: Tensor
    most: int
    slots: Tensor | None
    places: Tensor | None
    on_host: HostTensor

    @classmethod
    def of(cls, rows: Tensor, texts: int, sizes: Sizes | None = None) -> RowOrder:
        """Arrange `rows` (R,) on the host, where they are needed to select among them.

        With `sizes` there are slots in every case, and one of few numbers of them.
        """
        rows = rows.cpu()
        one_hot = functional.one_hot(rows, texts)
        rank = (one_hot.cumsum(0) - 1).gather(1, rows[:, None])[:, 0]
        most = int(rank.max()) + 1
        most = most if sizes is None else sizes("rows of a text", most)
        places = rows * most + rank
        slots = torch.zeros(texts * most, dtype=torch.long, device=rows.device)
        order = torch.arange(len(rows), device=rows.device)
        slots[places] = order
        if sizes is None and torch.equal(slots, order):
            slots = places = None
        return cls(rows, most, slots, places, HostTensor(rows))


@dataclass(frozen=True)
class SharedPrefix:
    """Texts that rows continue: row i continues text `order.rows[i]`, of which it sees `mask[i]`.

    `cache` holds P texts, `mask` is (R, K_p). All rows of a text attend to it at once, in the
    slots of `order`; `bias` (P, 1, S, 1, K_p) is the mask in slot order.
    """

    cache: GrowingCache
    order: RowOrder
    mask: Tensor
    bias: Tensor

    @classmethod
    def of(cls, cache: GrowingCache, order: RowOrder, mask: Tensor) -> SharedPrefix:
        """The texts in `cache` for rows in this order."""
        keys = cache.layers[0].keys
        bias = additive_mask(mask, keys.dtype)
        if order.slots is not None:
            bias = bias.index_select(0, order.slots)
        return cls(cache, order, mask, bias.view(len(keys), 1, order.most, 1, -1))

    def select(self, rows: Tensor) -> SharedPrefix:
        """The same texts for some of the rows (R',), which may repeat."""
        order = RowOrder.of(self.order.on_host.tensor[rows.cpu()], len(self.bias))
        mask = self.mask.index_select(0, to_device(rows, self.mask.device))
        return SharedPrefix.of(self.cache, to_device(order, mask.device), mask)

    def attend(self, queries: Tensor, layer: int) -> _Mixture:
        """Attention of `queries` (R, G, M, s) over the text of their row."""
        entry = self.cache.layers[layer]
        count = queries.shape[2]
        grouped = self._by_text(queries)
        scores = torch.matmul(grouped, entry.keys.transpose(-1, -2))
        texts, groups, _, columns = scores.shape
        scores.view(texts, groups, -1, count, columns).add_(self.bias)
        mixture = _mix(scores, entry.values)
        return _Mixture(*(self._by_row(part, count) for part in mixture))

    def _by_text(self, states: Tensor) -> Tensor:
        """(R, G, M, n) -> (P, G, S * M, n)."""
        _, groups, count, size = states.shape
        texts, _, most = self.bias.shape[:3]
        if self.order.slots is not None:
            states = states.index_select(0, self.order.slots)
        grouped = states.view(texts, most, groups, count, size).transpose(1, 2)
        return grouped.reshape(texts, groups, most * count, size)

    def _by_row(self, states: Tensor, count: int) -> Tensor:
        """(P, G, S * M, n) -> (R, G, M, n)."""
        _, groups, _, size = states.shape
        apart = states.view(len(states), groups, -1, count, size).transpose(1, 2)
        apart = apart.reshape(-1, groups, count, size)
        places = self.order.places
        return apart if places is None else apart.index_select(0, places)


class _Mixture(NamedTuple):
    """Attention before its division: `values` (.., M, s) and `total` (.., M, 1) over exp(score -
    `largest` (.., M, 1))."""

    values: Tensor
    total: Tensor
    largest: Tensor

    def joined(self, other: _Mixture) -> Tensor:
        """Attention (.., M, s) over what both have seen."""
        largest = torch.maximum(self.largest, other.largest)
        own, others = (self.largest - largest).exp(), (other.largest - largest).exp()
        total = self.total * own + other.total * others
        return (self.values * own + other.values * others) / total


def _mix(scores: Tensor, values: Tensor) -> _Mixture:
    """Values (.., K, s) weighted by the exponentials of scores (.., M, K), which are overwritten.

    Computed in float32 at least, whatever the precision of the products (as softmax in autocast).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # Where nothing is visible (padding before a row's first own token) it would be -inf: NaN.
    largest = scores.detach().amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(largest).exp_()
    return _Mixture(torch.matmul(weights, values), weights.sum(-1, keepdim=True), largest)


def runs_directly(base: PreTrainedModel) -> bool:
    """Whether the blocks of `base` can be called one by one: a plain Llama with SDPA attention."""
    return (
        type(base) is LlamaForCausalLM
        and base.config._attn_implementation == "sdpa"
        and not base.config.attention_dropout
    )


def run_blocks(
    base: PreTrainedModel,
    inputs_embeds: Tensor,
    positions: Tensor,
    mask: Tensor,
    cache: GrowingCache | StaticCache | None,
    prefix: SharedPrefix | None = None,
    *,
    full: bool = False,
    packed: Tensor | None = None,
    first_read: int = 0,
    output_hidden_states: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """States of new columns (R, W, d) after the final norm, and those of all layers if asked for.

    `positions` is (R, W); `mask` (R, K) says which of the rows' own columns, the new ones included,
    hold a token, and `full` that all are known to. `cache` is extended; None keeps no keys and
    values. Final states are returned from column `first_read` on: for earlier columns the last
    block only computes keys and values. Only where `runs_directly`: a `prefix`; `packed` (N,), flat
    indices of the new columns that hold tokens (`Packing`), with which `first_read` is 0 or W; and
    in mixed precision what is between products is fused (`compiled`).
    """
    if not runs_directly(base):
        output = base.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=output_hidden_states,
        )
        every = output.hidden_states if output_hidden_states else None
        return output.last_hidden_state[:, first_read:], every
    model = base.model
    width = inputs_embeds.shape[1]
    dtype = mixed_precision(inputs_embeds)
    low = None if dtype is None else Low(dtype, fused() if compiled else APART)
    visible = _visible(mask, full, width, prefix, inputs_embeds.dtype)
    rotation = _rotation(model, inputs_embeds, positions)
    packing = None if packed is None else Packing(packed, *inputs_embeds.shape[:2])
    hidden, every = inputs_embeds if packing is None else packing.packed(inputs_embeds), []
    first = 0
    for index, block in enumerate(model.layers):
        every.append(hidden)
        states = _normed(block.input_layernorm, hidden, low)
        if first_read and index == len(model.layers) - 1:
            first = first_read
            hidden = hidden[:, first:] if packing is None else hidden[:0]
            visible = _visible(mask, full, width - first, prefix, inputs_embeds.dtype)
        attention = _Attention(block.self_attn, index, rotation, cache, prefix, low, packing)
        hidden = hidden + attention(states, first, visible)
        states = _normed(block.post_attention_layernorm, hidden, low)
        hidden = hidden + _mlp(block.mlp, states, low)
    hidden = _normed(model.norm, hidden, low and low._replace(dtype=hidden.dtype))
    read = (*every, hidden) if output_hidden_states else (hidden,)
    if packing is not None:
        read = tuple(map(packing.unpacked, read))
    return read[-1], read if output_hidden_states else None


class Low(NamedTuple):
    """Mixed precision: that of products, and how all else is computed."""

    dtype: torch.dtype
    elementwise: Elementwise


@dataclass(frozen=True)
class _Attention:
    """Self-attention of one block: its weights, and what all blocks of a pass share."""

    module: torch.nn.Module
    layer: int
    rotation: tuple[Tensor, Tensor]
    cache: GrowingCache | StaticCache | None
    prefix: SharedPrefix | None
    low: Low | None
    packing: Packing | None

    def __call__(self, states: Tensor, first: int, visible: Tensor | None) -> Tensor:
        """Attention of the new columns (R, W, d) from `first` on, over the shared text, the row's
        earlier columns and the new ones: (R, W - `first`, d). If they are packed, so is it."""
        module, (cos, sin) = self.module, self.rotation
        keys, values, *rest = self._projected(states, first)
        (rows, _, width, _), count = keys.shape, keys.shape[2] - first
        keys = _rotated(keys, cos, sin, self.low)
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, self.layer)
        if not count:
            return states[:, width:] if self.packing is None else states[:0]
        queries = _rotated(rest[0], cos[:, :, first:], sin[:, :, first:], self.low)
        if self.prefix is None and count > 1:
            grouped = _takes_groups(queries, visible)
            if not grouped:
                heads_each = queries.shape[1] // keys.shape[1]
                keys, values = (x.repeat_interleave(heads_each, 1) for x in (keys, values))
            mixed = functional.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=visible,
                is_causal=visible is None,
                scale=module.scaling,
                enable_gqa=grouped,
            )
        else:
            queries = queries * module.scaling
            mixed = grouped_attention(queries, keys, values, visible, self.prefix, self.layer)
        mixed = mixed.transpose(1, 2).reshape(rows, count, -1)
        mixed = mixed if self.packing is None else self.packing.packed(mixed)
        return module.o_proj(mixed) if self.low is None else project([module.o_proj], mixed)[0]

    def _projected(self, states: Tensor, first: int) -> tuple[Tensor, ...]:
        """Keys and values of all columns (R, W, d), and queries of those from `first` on, if there
        are any."""
        module = self.module
        if self.low is None:
            projected = [module.k_proj(states), module.v_proj(states)]
            # Cut only here: gradients are summed in the order of these operations.
            read = self._read(states, first)
            projected += [module.q_proj(read)] if read.numel() else []
        elif first:
            projected = project([module.k_proj, module.v_proj], states)
            read = self._read(states, first)
            projected += project([module.q_proj], read) if read.numel() else []
        else:
            projected = project([module.k_proj, module.v_proj, module.q_proj], states)
        if self.packing is not None:
            projected = list(map(self.packing.unpacked, projected))
        return tuple(self._heads(part) for part in projected)

    def _read(self, states: Tensor, first: int) -> Tensor:
        """The columns from `first` on; of packed ones all or none."""
        if self.packing is None:
            return states[:, first:]
        return states[:0] if first else states

    def _heads(self, states: Tensor) -> Tensor:
        """(R, W, heads * s) -> (R, heads, W, s)."""
        return states.unflatten(-1, (-1, self.module.head_dim)).transpose(1, 2)


def _takes_groups(queries: Tensor, visible: Tensor | None) -> bool:
    """Whether SDPA has a fast kernel for fewer heads of keys than of queries."""
    return visible is None or queries.device.type == "cpu"


def grouped_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    prefix: SharedPrefix | None,
    layer: int,
) -> Tensor:
    """Attention without copying keys, for single new columns and for rows that share a text.

    `queries` (R, H, W, s) are already scaled; `keys` and `values` are (R, G, K, s), each read by
    all heads of a group at once. `bias` is (R, W or 1, K).
    """
    rows, heads, width, size = queries.shape
    groups = keys.shape[1]
    queries = queries.reshape(rows, groups, -1, size)
    scores = torch.matmul(queries, keys.transpose(-1, -2))
    if bias is not None:
        scores.view(rows, groups, -1, width, keys.shape[2]).add_(bias[:, None, None])
    if prefix is None:
        mixed = torch.matmul(scores.softmax(-1), values)
        return mixed.reshape(rows, heads, width, size)
    mixed = prefix.attend(queries, layer).joined(_mix(scores, values))
    return mixed.reshape(rows, heads, width, size)


def _normed(norm: torch.nn.Module, hidden: Tensor, low: Low | None) -> Tensor:
    """`norm` of states (R, W, d), in `low` precision if products are."""
    if low is None:
        return norm(hidden)
    epsilon = norm.eps if isinstance(norm, torch.nn.RMSNorm) else norm.variance_epsilon
    flat = low.elementwise.normed(hidden.flatten(0, -2), norm.weight, epsilon, low.dtype)
    return flat.view(hidden.shape)


def _mlp(mlp: torch.nn.Module, states: Tensor, low: Low | None) -> Tensor:
    """The MLP of a block on states (R, W, d)."""
    if low is None:
        return mlp(states)
    gate, up = project([mlp.gate_proj, mlp.up_proj], states)
    if not isinstance(mlp.act_fn, torch.nn.SiLU):
        return project([mlp.down_proj], mlp.act_fn(gate) * up)[0]
    inner = low.elementwise.gated(gate.flatten(0, -2), up.flatten(0, -2))
    return project([mlp.down_proj], inner.view(gate.shape))[0]


def _rotation(
    model: torch.nn.Module, inputs_embeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (R, 1, W, s) of the positions; the first half of the sines is negated."""
    cos, sin = model.rotary_emb(inputs_embeds, position_ids=positions)
    sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)
    return cos.unsqueeze(1), sin.unsqueeze(1)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor, low: Low | None) -> Tensor:
    """Rotary position embedding of (R, heads, W, s) by `_rotation`'s cosines and sines."""
    if low is not None:
        return low.elementwise.rotated(states, cos, sin, low.dtype)
    # Products and sum round as in transformers: some recorded gradients are so sensitive that a
    # fused operation, though more exact, changes them by a thousandth.
    left, right = states.chunk(2, -1)
    return states * cos + torch.cat([right, left], -1) * sin


def _visible(
    mask: Tensor, full: bool, width: int, prefix: SharedPrefix | None, dtype: torch.dtype
) -> Tensor | None:
    """Which of its row's own (R, K) columns each of the last `width` columns sees.

    None means all earlier ones. Otherwise a bool mask (R, 1, W, K) for SDPA; for single columns and
    with a shared text, numbers (R, W or 1, K) to be added to the scores.
    """
    columns = mask.shape[1]
    if width <= 1:
        return None if full else additive_mask(mask, dtype)[:, None]
    if prefix is None and full and width == columns:
        return None
    new = torch.arange(columns - width, columns, device=mask.device)
    before = torch.arange(columns, device=mask.device) <= new[:, None]
    visible = mask[:, None] & before
    return visible[:, None] if prefix is None else additive_mask(visible, dtype)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, minus infinity elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )
