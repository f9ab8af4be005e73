"""Seeds: one for each purpose, derived from the configured seed and a frozen text.

These texts are part of every result. A changed letter changes the initial weights, the order of the
data, the dropout or the samples of every model, so none may follow a renamed task or module;
`tests/golden/` records the results that they give.
"""

from __future__ import annotations

import hashlib
import random

import numpy
import torch

INITIAL_WEIGHTS = "{model} initial weights"
DATA_ORDER = "{model} data order"
STEP = "{model} step {step}"
"""Dropout and everything else that is random within an optimiser step."""

ROLLOUTS = "{model} rollouts {round}"
STOP_LENGTHS = "{model} stop lengths {round}"
MIXTURE_NOISE = "{model} mixtures {step} {row}"
TRACES = "{model} traces"
ENCODER = "{model} encoder {run}"
LATENT_NOISE = "latent noise of {row}"
SPEED = "{model} speed {step}"
GROUP_LABELS = "{model} group labels {step}"
TEXT_STYLE = "text style of {row}"
ANY_OPENING = "opening of {row}"
RANDOM_READOUT = "readout of {row}"
VERIFIERS = "verifiers of {row}"
CURRICULUM = "{model} curriculum {step} of {example}"


def seed_for(seed: int, purpose: str, rollbacks: int = 0) -> int:
    """A seed of 63 bits for one purpose: one of the texts above with its names filled in.

    Each rollback of a training that diverged gives another seed.
    """
    content = f"{purpose}:{seed}" + (f":rollback {rollbacks}" if rollbacks else "")
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int, purpose: str) -> int:
    """Seed Python, NumPy and torch for one purpose; returns the derived seed."""
    derived = seed_for(seed, purpose)
    random.seed(derived)
    numpy.random.seed(derived % 2**32)
    torch.manual_seed(derived)
    return derived
