"""iCoT, stepwise internalisation: the chain of thought loses its tokens one after the other.

Deng, Choi and Shieber, *From Explicit CoT to Implicit CoT* (arXiv 2405.14838). Of each row's
reasoning the first (or last) tokens are removed, ever more of them. There are no latents: what is
left of the text is written as text.

Pure functions; `curriculum.py` trains with them.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal

from latent_reasoning.data.examples import Ids

LARGEST_OFFSET = 99
"""The rest of the distribution's mass lies here."""


@dataclass(frozen=True)
class Removal:
    """How many tokens are removed at a step.

    The scheduled number begins at `start` and grows by one every `steps_per_token` steps after
    `pretrain_steps` (0: before every step). From `all_beyond` on all is removed (None: never all at
    once). Each row's own number is larger by a random offset, geometric with `smoothing`, lambda
    (None: no offset), except in the pre-training.
    """

    start: int = 0
    steps_per_token: int = 1
    pretrain_steps: int = 0
    all_beyond: int | None = None
    side: Literal["left", "right"] = "left"
    smoothing: float | None = None

    def scheduled(self, step: int) -> float:
        """The scheduled number at step `step` (from 0), without an offset; infinite for all.

        Without steps between tokens it grows in the pre-training too, as in the public code.
        """
        if self.steps_per_token:
            grown = max(0, step - self.pretrain_steps) // self.steps_per_token
        else:
            grown = step + 1
        number = self.start + grown
        return math.inf if self.all_beyond is not None and number >= self.all_beyond else number

    def removed(self, step: int, scheduled: float, offset: int) -> float:
        """The number of one row at a step; infinite for all."""
        return self.start if step < self.pretrain_steps else scheduled + offset

    def remainder(self, tokens: Ids, number: float) -> Ids:
        """What is left of a row's reasoning without `number` of its tokens."""
        count = int(min(number, len(tokens)))
        return tokens[count:] if self.side == "left" else tokens[: len(tokens) - count]

    def offset(self, draws: random.Random) -> int:
        """A random offset; nothing is drawn where there is none."""
        if self.smoothing is None:
            return 0
        uniform = draws.random()
        reached = itertools.accumulate(offset_probabilities(self.smoothing))
        return next((o for o, total in enumerate(reached) if uniform < total), LARGEST_OFFSET)


def offset_probabilities(smoothing: float) -> list[float]:
    """P(offset = k), k = 0 .. 99: (1 - e^-lambda) e^(-lambda k), the rest of the mass on 99.

    With lambda = 4, 98.2 % of the offsets are 0.
    """
    none = 1 - math.exp(-smoothing)
    usual = [none * math.exp(-smoothing * k) for k in range(LARGEST_OFFSET)]
    return [*usual, 1 - math.fsum(usual)]
