"""What a training loop has to know of a curriculum: which stage a step belongs to."""

from __future__ import annotations

from typing import Protocol


class Curriculum(Protocol):
    """Stages of a training whose examples change, numbered in ascending order.

    A task that has one holds it as `curriculum`.
    """

    @property
    def resets_optimizer(self) -> bool:
        """Whether a new stage begins with a new optimiser (its moments are forgotten)."""

    def stage(self, step: int) -> int:
        """The stage of optimiser step `step` (from 0)."""
