"""Blocks called one by one against transformers' own forward, float64, states and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latent_reasoning.config import Lora
from latent_reasoning.model import blocks, reasoner
from latent_reasoning.model.blocks import RowOrder, runs_directly
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reading import plan_prompts
from latent_reasoning.model.reasoner import LatentReasoner
from tests.model.models import (
    HIDDEN,
    START,
    STOP,
    build_base,
    build_reasoner,
    pad,
    slow_hidden_states,
)

PROMPTS = [[2, 3, 4, 5, 6, START], [7, START], [8, 9, 3, START], [5, 6, START]]
# Five answers continue from the first prompt, one from the second, none from the third.
TEXTS = torch.tensor([0, 0, 3, 0, 1, 0, 0])


@pytest.fixture
def through_transformers(monkeypatch):
    """Switches to transformers' own forward, and to copies of shared texts."""

    def switch() -> None:
        for module in (blocks, reasoner):
            monkeypatch.setattr(module, "runs_directly", lambda base: False)

    return switch


def states(model: LatentReasoner) -> list[Tensor]:
    """States of prompts, latent steps in which rows take part or not, and branches of answers."""
    torch.manual_seed(1)
    state = model.read_prompts(*pad(PROMPTS, "left"))
    results = [state.last_hidden]
    takes_part = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1]]).bool()
    for mask in takes_part.unsqueeze(-1):
        inputs = model.latent_input(state.last_hidden).unsqueeze(1)
        results.append(model.advance(state, inputs, mask)[mask])
    passes = torch.arange(len(takes_part)) < torch.tensor([0, 1, 3, 1, 1, 0, 1])[:, None]
    steps = (passes & takes_part.T[TEXTS]).sum(1)
    tokens = torch.tensor([len(PROMPTS[text]) for text in TEXTS]) + steps
    # Counted in tokens: where transformers runs the blocks, columns close up.
    seen = state.mask[TEXTS] & (state.mask[TEXTS].cumsum(1) <= tokens[:, None])
    branches = model.branch(state, RowOrder.of(TEXTS, len(PROMPTS)), seen)
    width = 4
    mask = torch.arange(width) < torch.tensor([4, 2, 3, 4, 1, 4, 4])[:, None]
    inputs = torch.randn(len(TEXTS), width, HIDDEN, dtype=torch.float64)
    results.append(model.advance(branches, inputs, mask)[mask])
    fewer = branches.select(torch.tensor([3, 3, 5, 2]))
    for _ in range(2):
        inputs = torch.randn(4, 1, HIDDEN, dtype=torch.float64)
        results.append(model.advance(fewer, inputs)[:, -1])
    return results


def gradients(model: LatentReasoner, results: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    sum((result * torch.randn_like(result)).sum() for result in results).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_states_and_gradients_equal_those_of_transformers(through_transformers, with_lora, tied):
    model = build_reasoner(tied=tied)
    if with_lora:
        torch.manual_seed(3)
        attach_lora(model, Lora(r=2, alpha=4, dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.double()
    assert runs_directly(model.base)
    own = states(model)
    own_gradients = gradients(model, own)
    through_transformers()
    expected = states(model)
    expected_gradients = gradients(model, expected)
    for actual, other in zip(own, expected, strict=True):
        assert (actual - other).abs().max() < 1e-11
    assert own_gradients.keys() == expected_gradients.keys()
    for name, gradient in own_gradients.items():
        other = expected_gradients[name]
        assert (gradient - other).norm() <= 1e-9 * max(other.norm(), 1e-3), name


def test_repeated_heads_of_keys_give_the_same_states(monkeypatch):
    model = build_reasoner()
    expected = states(model)
    monkeypatch.setattr(blocks, "_takes_groups", lambda queries, visible: False)
    for actual, other in zip(states(model), expected, strict=True):
        assert (actual - other).abs().max() < 1e-12


def test_a_branch_copies_nothing_of_the_text_that_it_shares():
    model = build_reasoner()
    state = model.read_prompts(*pad(PROMPTS, "left"))
    branches = model.branch(state, RowOrder.of(TEXTS, len(PROMPTS)), state.mask[TEXTS])
    assert branches.prefix.cache is state.cache
    assert branches.cache.get_seq_length() == 0
    assert branches.select(torch.tensor([1, 4])).prefix.cache is state.cache


@pytest.mark.parametrize("order", [[1, 0], [0, 1, 0, 1], [2, 0, 1, 1]])
@torch.no_grad()
def test_rows_continue_texts_in_any_order_and_may_begin_with_padding(order):
    """The first two orders are their own inverses: slots and places are alike, but not in order."""
    model = build_reasoner()
    state = model.read_prompts(*pad(PROMPTS[:3]))
    texts = torch.tensor(order)
    rows = model.branch(state, RowOrder.of(texts, 3), state.mask[texts])
    answers = [[STOP, 7], [STOP, 8, 9], [STOP, 3, 4], [STOP, 5]][: len(order)]
    ids, mask = pad(answers)
    hidden = model.advance(rows, model.embed(ids), mask.bool())
    for row, (text, answer) in enumerate(zip(order, answers, strict=True)):
        expected = slow_hidden_states(model, [*PROMPTS[text], *answer])[-1][-len(answer) :]
        assert (hidden[row, -len(answer) :] - expected).abs().max() < 1e-11


def test_other_architectures_go_through_transformers():
    assert not runs_directly(build_base("gpt2"))
    assert not runs_directly(build_base("qwen2"))
    with_dropout = build_base()
    with_dropout.config.attention_dropout = 0.1
    assert not runs_directly(with_dropout)


def test_of_a_prompt_the_last_block_reads_the_last_token_alone():
    model = build_reasoner()
    widths = []
    for block in model.base.model.layers:
        block.mlp.register_forward_pre_hook(lambda _, arguments: widths.append(arguments[0].shape))
    state = model.read_prompts(*pad(PROMPTS, "left"))
    assert [tuple(shape) for shape in widths] == [(4, 6, HIDDEN), (4, 1, HIDDEN)]
    widths.clear()
    model.read(plan_prompts(model, *pad(PROMPTS, "left"), last=False))
    assert [tuple(shape) for shape in widths] == [(4, 6, HIDDEN), (4, 0, HIDDEN)]
    everything = model(*pad(PROMPTS, "left")).last_hidden[:, -1]
    assert (state.last_hidden - everything).abs().max() < 1e-12
