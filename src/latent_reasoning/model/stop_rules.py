"""Rules by which a model leaves thinking, beside the two-way stop head.

`marker`: the language-model head decides. STOP is its probability of a marker against all other
words together, the special tokens left out (CoLaR's `###`, Latent-SFT's `</think>`); greedily, the
model stops where the marker is the likeliest word.

`fixed`: the model continues until the bound on latent steps (`LatentSettings.max_latent_steps`).

d hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.special_rows import ids_on


def word_logits(logits: Tensor, settings: LatentSettings) -> Tensor:
    """Logits `(.., V)` of words to go on with: the special tokens and a marker are -inf."""
    excluded = {settings.start_id, settings.end_id, settings.continue_id, settings.stop_id}
    excluded.add(settings.marker)
    return logits.index_fill(-1, ids_on(logits.device, *sorted(excluded)), float("-inf"))


def marker_logits(logits: Tensor, settings: LatentSettings, *, greedy: bool = False) -> Tensor:
    """Logits `(.., 2)` of CONTINUE and STOP from those of the vocabulary `(.., V)`.

    CONTINUE stands for all words together; with `greedy`, for the likeliest one.
    """
    words = word_logits(logits, settings)
    on = words.amax(-1) if greedy else words.logsumexp(-1)
    return torch.stack([on, logits[..., settings.marker]], -1)


def fixed_logits(hidden: Tensor) -> Tensor:
    """Logits `(.., 2)` of CONTINUE, which is certain, and STOP, at states `(.., d)`."""
    logits = hidden.new_zeros(*hidden.shape[:-1], 2)
    logits[..., 1] = float("-inf")
    return logits
