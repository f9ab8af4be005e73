"""Distillation losses: distances, normalisation and refusals; conformance has recorded losses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latent_reasoning.config import ConfigError, Distillation
from latent_reasoning.sft.distillation import (
    Compared,
    StateSummary,
    distillation_losses,
    summarise_states,
)

ROWS, BLOCKS, WIDTH = 4, 3, 5
TEACHER_LENGTH, STUDENT_LENGTH = 7, 6


@pytest.fixture
def states() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(ROWS, TEACHER_LENGTH, dtype=torch.bool)
    target[:, -2] = True
    latent_target = torch.zeros(ROWS, STUDENT_LENGTH, dtype=torch.bool)
    latent_target[:, -1] = True
    reasoning = torch.zeros_like(target)
    reasoning[0, 1:4] = reasoning[1, 2:4] = reasoning[3, 3:4] = True
    latent_continue = torch.zeros_like(latent_target)
    latent_continue[:, 1:3] = True
    return {
        "teacher": torch.randn(BLOCKS + 1, ROWS, TEACHER_LENGTH, WIDTH, generator=generator),
        "student": 3 * torch.randn(BLOCKS + 1, ROWS, STUDENT_LENGTH, WIDTH, generator=generator),
        "target": target,
        "latent_target": latent_target,
        "reasoning": reasoning,
        "latent_continue": latent_continue,
    }


def losses(states: dict[str, Tensor], **settings) -> dict[str, Tensor]:
    distillation = Distillation(**({"codi_weight": 0.0} | settings))
    summaries: list[StateSummary] = []
    for side, target, span in (
        ("teacher", "target", "reasoning"),
        ("student", "latent_target", "latent_continue"),
    ):
        selected = states[target] | states[span]
        chosen = [layer[selected] for layer in states[side]]
        summaries.append(
            summarise_states(
                chosen,
                Compared.of(selected, states[target], states[span]),
                distillation,
            )
        )
    return distillation_losses(*summaries, distillation)


def smooth_l1(first: Tensor, second: Tensor) -> Tensor:
    distance = (first - second).abs()
    return torch.where(distance < 1, 0.5 * distance**2, distance - 0.5)


def test_a_block_range_the_model_does_not_have_is_refused(states):
    told = r"block_range: 1\.\.3 does not fit .* blocks are 0\.\.2"
    with pytest.raises(ConfigError, match=told):
        losses(states, codi_weight=1.0, block_range=(1, 3))


@pytest.mark.parametrize(
    ("distance", "elementwise"),
    [
        ("smooth_l1", smooth_l1),
        ("l1", lambda first, second: (first - second).abs()),
        ("l2", lambda first, second: (first - second) ** 2),
    ],
)
def test_distance_and_normalisation(states, distance, elementwise):
    teacher = torch.stack([layer[:, -2] for layer in states["teacher"][1:]])
    student = torch.stack([layer[:, -1] for layer in states["student"][1:]])
    plain = elementwise(student, teacher).mean()
    for normalise, divisor in (("none", 1.0), ("std", teacher.std())):
        actual = losses(states, codi_weight=1.0, distance=distance, normalise=normalise)
        torch.testing.assert_close(actual["codi_loss"], plain / divisor)


def test_no_gradient_reaches_the_teacher(states):
    states["teacher"].requires_grad_()
    states["student"].requires_grad_()
    sum(losses(states, codi_weight=1.0, meaned_weight=1.0).values()).backward()
    assert states["teacher"].grad is None
    assert states["student"].grad[0].abs().sum() == 0, "the embedding layer is not compared"
    assert states["student"].grad[1:].abs().sum() > 0


def test_a_row_without_a_target_token_is_refused(states):
    states["target"][1] = False
    with pytest.raises(ValueError, match="exactly one target token"):
        losses(states, codi_weight=1.0)
