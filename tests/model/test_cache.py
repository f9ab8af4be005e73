"""The growing cache holds what transformers' own holds, and never changes what it was given."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from latent_reasoning.model.cache import ROOM, GrowingCache


def states(columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, columns, 4, generator=generator)


@torch.no_grad()
def test_columns_written_one_by_one_equal_a_concatenation():
    own, expected = GrowingCache(), DynamicCache()
    for step, columns in enumerate([5, *[1] * (2 * ROOM + 3), 4]):
        keys, values = states(columns, step), states(columns, -step - 1)
        for actual, other in zip(
            own.update(keys, values, 0), expected.update(keys, values, 0), strict=True
        ):
            assert torch.equal(actual, other)
    assert own.get_seq_length() == expected.get_seq_length() == 5 + 2 * ROOM + 3 + 4


@torch.no_grad()
def test_a_new_column_does_not_copy_the_others():
    cache = GrowingCache()
    cache.update(states(5, 0), states(5, 1), 0)
    before, _ = cache.update(states(1, 2), states(1, 3), 0)
    after, _ = cache.update(states(1, 4), states(1, 5), 0)
    assert after.data_ptr() == before.data_ptr()


def test_a_trajectory_with_its_graph_is_not_written_over_by_what_goes_on_from_it():
    keys, values = states(5, 0).requires_grad_(), states(5, 1).requires_grad_()
    first = GrowingCache()
    first.update(keys * 1, values * 1, 0)
    graph, _ = first.update(states(1, 2), states(1, 3), 0)
    kept = graph.detach().clone()
    with torch.no_grad():
        second = GrowingCache()
        second.update(first.layers[0].keys, first.layers[0].values, 0)
        second.update(states(1, 4), states(1, 5), 0)
        first.update(states(1, 6), states(1, 7), 0)
    assert torch.equal(graph, kept)
    assert not torch.equal(first.layers[0].keys[..., -1, :], second.layers[0].keys[..., -1, :])
    graph.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))
