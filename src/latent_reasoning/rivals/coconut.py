"""Coconut: latent steps take the place of the first reasoning steps, stage by stage.

Hao et al., *Training Large Language Models to Reason in a Continuous Latent Space*
(arXiv 2412.06769). At stage s the first s steps of a row are left out and `latents_per_step`
latent steps are put in for each; from the stage after `last_latent_stage` on all text is gone. The
input of a latent step is the hidden state before it, unchanged (`recurrent_filter: none`).

Pure functions; `curriculum.py` trains with them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Stages:
    """The map from a row and a stage to what the row then reads.

    `latents_per_step` is c (0: no thought, the steps only disappear); `last_latent_stage` is M. A
    row with fewer steps than the stage asks for has as many latent steps as the others. Without
    `pad_latents`, an option of the public code, it has from stage M + 1 on only c for each of its
    own steps; the evaluation then has to know their number, so no model is trained that way here.
    """

    latents_per_step: int
    last_latent_stage: int
    pad_latents: bool = True

    @property
    def last(self) -> int:
        """The first stage at which no text is left in any row; later ones are the same."""
        return self.last_latent_stage + 1

    def of_training(self, steps: int, stage: int) -> tuple[int, int]:
        """Latent steps, and how many of a row's `steps` are left out, at a stage."""
        if stage <= self.last_latent_stage:
            return stage * self.latents_per_step, min(stage, steps)
        return self.of_evaluation(steps, stage), steps

    def of_evaluation(self, steps: int, stage: int) -> int:
        """Latent steps of a prompt; without `pad_latents` a row's true `steps` limit them."""
        most = self.last_latent_stage if self.pad_latents else min(steps, self.last_latent_stage)
        return min(most, stage) * self.latents_per_step


def mixed_stage(steps: int, stage: int, share: float, draws: random.Random) -> int:
    """A row's stage: `stage`, or with probability `share` any from 0 to its number of `steps`.

    A drawn stage may be above the last latent one; then all text goes.
    """
    return draws.randrange(steps + 1) if draws.random() < share else stage
