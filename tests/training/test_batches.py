"""Micro-batches made ahead are those of their step, however the plan has changed since."""

from __future__ import annotations

import torch

from latent_reasoning.config import Runtime, Training
from latent_reasoning.training.batches import BatchesAhead, BatchPlan

CPU = torch.device("cpu")


def test_batches_made_ahead_are_made_again_where_the_plan_has_changed():
    training, runtime = Training(steps=9, batch_size=4), Runtime(micro_batch_size=4)
    plan, made = BatchPlan(list(range(12)), training, runtime, 0, "a"), []

    def make(step: int) -> list[list[int]]:
        made.append(step)
        return plan.micro_batches(step)

    ahead = BatchesAhead(make, plan)
    ahead.prepare(1, CPU)
    assert ahead.of(1) == plan.micro_batches(1)
    assert made == [1]
    for change in (lambda: plan.limit_micro_batches(2), lambda: plan.reorder(rollbacks=1)):
        ahead.prepare(2, CPU)
        change()
        assert ahead.of(2) == plan.micro_batches(2)
    ahead.prepare(3, CPU)
    assert ahead.of(5) == plan.micro_batches(5)
    assert made == [1, 2, 2, 2, 2, 3, 5]
