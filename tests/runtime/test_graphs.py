"""What is captured on a GPU: one program for each shape, on memory of its own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latent_reasoning.runtime import graphs
from latent_reasoning.runtime.device import HostTensor
from latent_reasoning.runtime.graphs import Captured, Programs, Sizes, bucket

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"),
        id="cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    ),
]


@dataclass(frozen=True)
class Inputs:
    numbers: Tensor
    doubled: bool
    host: HostTensor


def inputs(*numbers: float, doubled: bool = True, host: float = 0) -> Inputs:
    return Inputs(torch.tensor(numbers), doubled, HostTensor(torch.tensor([host])))


def total(given: Inputs) -> Tensor:
    return given.numbers.sum() * (2 if given.doubled else 1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_program_for_each_shape_and_each_setting_that_is_met_again(device):
    programs = Programs(total, device)
    assert programs(inputs(1, 2)).item() == 6
    assert len(programs) == 0
    assert programs(inputs(3, 4)).item() == 14
    assert programs(inputs(3, 5, host=1)).item() == 16  # what stays on the host is not looked at
    assert len(programs) == 1
    for _ in range(2):
        assert programs(inputs(3, 4, doubled=False)).item() == 7
        assert programs(inputs(1, 2, 3)).item() == 12
    assert len(programs) == 3
    kept = programs(inputs(1, 2))  # a result that is still there holds memory of its pool
    programs.clear()
    assert len(programs) == 0
    for _ in range(3):
        assert programs(inputs(1, 2)).item() == 6
    assert len(programs) == 1
    assert kept.item() == 6


def test_a_pool_is_not_used_again_once_its_programs_are_forgotten(monkeypatch):
    handles = itertools.count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    programs = Programs(total, torch.device("cuda"))
    before = programs._pool
    programs.clear()
    assert programs._pool not in (None, before)


@pytest.mark.parametrize("device", DEVICES)
def test_further_shapes_are_worked_on_without_a_program(device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    programs = Programs(total, device)
    for numbers in ([1.0], [1.0, 1.0], [1.0, 1.0, 1.0], [2.0]):
        for _ in range(3):
            assert programs(inputs(*numbers)).item() == 2 * sum(numbers)
            assert len(programs) <= 2


def test_sizes_are_buckets():
    assert [bucket(n) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert bucket(0) == 0
    assert all(n <= bucket(n) < 1.5 * n for n in range(1, 513))
    assert all(n <= bucket(n) < 1.125 * n for n in range(513, 9000, 7))


def test_a_size_is_the_largest_so_far_of_its_kind_and_place():
    sizes = Sizes()
    found = [sizes("text", n) for n in (50, 90, 50, 30, 70, 100)]
    assert found == [64, 96, 96, 32, 96, 128]
    with sizes.of("teacher"):
        assert sizes("text", 5) == 6
        with sizes.of("again"):
            assert sizes("text", 9) == 12
        assert sizes("text", 4) == 6
    assert sizes("other", 5) == 6


@pytest.mark.parametrize("device", DEVICES)
def test_a_captured_function_works_on_the_same_memory(device):
    count = torch.zeros((), device=device)
    captured = Captured(lambda: count.add_(1), device)
    before = count.item()
    for _ in range(3):
        captured.run()
    assert count.item() == before + 3
