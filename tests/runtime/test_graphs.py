"""What is captured on a GPU: one program for each shape, on memory of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from latent_reasoning.runtime import graphs
from latent_reasoning.runtime.device import HostTensor
from latent_reasoning.runtime.graphs import Captured, Programs

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"),
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
def test_a_program_for_each_shape_and_each_setting(device):
    programs = Programs(total, device)
    assert programs(inputs(1, 2)).item() == 6
    assert programs(inputs(3, 4)).item() == 14
    assert programs(inputs(3, 4, host=1)).item() == 14  # what stays on the host is not looked at
    assert len(programs) == 1
    assert programs(inputs(3, 4, doubled=False)).item() == 7
    assert programs(inputs(1, 2, 3)).item() == 12
    assert len(programs) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_the_oldest_program_goes_where_there_are_too_many(device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    programs = Programs(total, device)
    for numbers in ([1.0], [1.0, 1.0], [1.0, 1.0, 1.0], [2.0]):
        assert programs(inputs(*numbers)).item() == 2 * sum(numbers)
        assert len(programs) <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_captured_function_works_on_the_same_memory(device):
    count = torch.zeros((), device=device)
    captured = Captured(lambda: count.add_(1), device)
    before = count.item()
    for _ in range(3):
        captured.run()
    assert count.item() == before + 3
