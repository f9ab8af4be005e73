"""Latent steps whose inputs are given: a text with them is read in one parallel pass.

Where a training knows what a latent step reads (CoLaR, Latent-SFT, CoT2's CSFT), and where a
sampled step is scored again, no step has to wait for the one before it.

B rows, T positions, d hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.state import ReasoningState


def given_inputs(model: LatentReasoner, input_ids: Tensor, latents: Tensor) -> Tensor:
    """Input embeddings `(B, T, d)`: `latents` `(B, T, d)` at CONTINUE, those of `input_ids` `(B,
    T)` elsewhere."""
    embedded = model.embed(input_ids)
    is_step = (input_ids == model.settings.continue_id).unsqueeze(-1)
    return torch.where(is_step, latents.to(embedded.dtype), embedded)


def read_given(model: LatentReasoner, inputs_embeds: Tensor, mask: Tensor) -> Tensor:
    """States `(B, T, d)` after inputs `(B, T, d)`; `mask` `(B, T)` is 0 at padding."""
    return model.advance(ReasoningState.empty(mask.bool()), inputs_embeds, mask.bool())
