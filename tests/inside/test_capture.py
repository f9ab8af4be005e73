"""Captured states against the model's own, skipped blocks against a slow loop."""

from __future__ import annotations

import pytest
import torch

from latent_reasoning.config import UserError
from latent_reasoning.inside.capture import (
    Anatomy,
    attention_weights,
    capture,
    captured,
    check_sum,
    names,
    read,
    replayed,
    skipped,
)
from latent_reasoning.inside.walk import Walk
from latent_reasoning.model.reasoner import LatentReasoner
from tests.model.models import ARCHITECTURES, START, build_base, build_reasoner

PROMPTS = [[5, 6, 7, 8, START], [9, 10, START]]


def whole_sequences(model, n):
    """The inputs and the mask of the prompts and of `n` latents after each."""
    walk = Walk.begin(model, PROMPTS).run(n)
    embedded = [model.embed(torch.tensor(prompt)) for prompt in PROMPTS]
    latents = torch.stack(walk.inputs, 1)
    rows = [torch.cat([e, z]) for e, z in zip(embedded, latents, strict=True)]
    width = max(map(len, rows))
    inputs = torch.zeros(len(rows), width, latents.shape[-1], dtype=latents.dtype)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        inputs[i, -len(row) :], mask[i, -len(row) :] = row, True
    return walk, inputs, mask


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_states_are_the_models_own(architecture):
    model = build_reasoner(architecture)
    walk, inputs, mask = whole_sequences(model, 3)
    states = capture(model, Anatomy.of(model.base), inputs.detach(), mask)
    own = model.base.base_model(
        inputs_embeds=inputs[:1], output_hidden_states=True, use_cache=False
    ).hidden_states
    for stream, hidden in zip(states.stream[:-1], own[:-1], strict=True):
        torch.testing.assert_close(stream[:1], hidden.detach())
    torch.testing.assert_close(states.final[:1], own[-1].detach())
    # Latents read again at once are those of the walk.
    torch.testing.assert_close(states.final[:, -4:], torch.stack(walk.hidden, 1))
    summed = states.stream[0] + sum(states.attention) + sum(states.mlp)
    torch.testing.assert_close(summed[mask], states.stream[-1][mask])
    assert [name[:2] for name in states.named()] == names(2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_skipped_block_is_one_that_the_model_lacks(architecture):
    model = build_reasoner(architecture)
    _, inputs, mask = whole_sequences(model, 2)
    anatomy = Anatomy.of(model.base)
    with skipped(anatomy, 0):
        without = read(model, inputs[:1].detach(), mask[:1])
    body = model.base.base_model
    blocks = body.layers if hasattr(body, "layers") else body.h
    del blocks[0]
    model.base.config.num_hidden_layers = 1
    for block in blocks:
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 0
    torch.testing.assert_close(without, read(model, inputs[:1].detach(), mask[:1]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_blocks_change_nothing_and_leave_the_model_as_it_was(architecture):
    model = build_reasoner(architecture)
    _, inputs, mask = whole_sequences(model, 2)
    anatomy = Anatomy.of(model.base)
    states = capture(model, anatomy, inputs.detach(), mask)
    with replayed(anatomy, states, 1), captured(model.base, anatomy) as again:
        read(model, inputs.detach(), mask)
    assert torch.equal(again.final, states.final)
    states.mlp[0].zero_()
    with replayed(anatomy, states, 1):
        assert not torch.equal(read(model, inputs.detach(), mask), again.final)
    assert torch.equal(read(model, inputs.detach(), mask), again.final)


def test_a_block_skipped_at_some_columns_leaves_earlier_ones_as_they_were():
    model = build_reasoner()
    _, inputs, mask = whole_sequences(model, 2)
    anatomy, where = Anatomy.of(model.base), torch.zeros_like(mask)
    where[:, 3] = True
    untouched = read(model, inputs.detach(), mask)
    with skipped(anatomy, 1, where):
        changed = read(model, inputs.detach(), mask)
    torch.testing.assert_close(changed[:, :3], untouched[:, :3])
    # The last block's output reaches no other column.
    torch.testing.assert_close(changed[:, 4:], untouched[:, 4:])
    assert not torch.allclose(changed[:, 3], untouched[:, 3])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_is_read_without_changing_the_model(architecture):
    model = build_reasoner(architecture)
    _, inputs, mask = whole_sequences(model, 2)
    before = read(model, inputs.detach(), mask)
    weights = attention_weights(model, Anatomy.of(model.base), inputs.detach(), mask)
    assert [w.shape for w in weights] == [(2, 4, 7, 7)] * 2
    for weight in weights:
        torch.testing.assert_close(weight[0].sum(-1).double(), torch.ones(4, 7).double())
        assert weight[0].triu(1).abs().max() == 0
    assert torch.equal(read(model, inputs.detach(), mask), before)


def test_a_running_sum_that_is_not_the_stream_is_refused():
    model = LatentReasoner(build_base(), None)
    inputs = model.embed(torch.tensor([[3, 4, 5]])).detach()
    mask = torch.ones(1, 3, dtype=torch.bool)
    states = capture(model, Anatomy.of(model.base), inputs, mask)
    states.mlp[1] = states.mlp[1] * 1.1
    with pytest.raises(UserError, match="block 1 does not add"):
        check_sum(states, mask, "Tiny")
    states.mlp[1] = states.mlp[1] * torch.nan
    with pytest.raises(UserError, match="misses by nan"):
        check_sum(states, mask, "Tiny")


def test_other_blocks_are_refused():
    base = build_base()
    del base.model.layers[0].post_attention_layernorm
    with pytest.raises(UserError, match="cannot be captured"):
        Anatomy.of(base)
