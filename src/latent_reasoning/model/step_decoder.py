"""SIM-CoT's step decoder: a second language model that writes the step a latent input stands for.

It reads one latent input, or a group of them, and the step's text as the host embeds it, and
predicts that text. Its loss teaches the host to put the steps into its latent inputs. It is trained
in full beside the host, as the module `step_decoder` of it: checkpoints hold it, a finished model
does not. Source: arXiv 2509.20317, section 3, and its public code.

M texts, c latent inputs in a group, W tokens of the longest text, d the host's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from latent_reasoning.model.bases import adjusted_logits
from latent_reasoning.model.passes import SpecialIds
from latent_reasoning.model.reasoner import LatentReasoner

NAME = "step_decoder"
STEP_LOSS = "step_loss"
"""The name of its loss among the metrics."""


class StepDecoder(nn.Module):
    """A language model on top of another one's inputs.

    A `decoder` of another width gets a linear layer in front.
    """

    first_position = 0
    """Positions are counted from it (the public code for Coconut: 1)."""

    def __init__(self, decoder: PreTrainedModel, hidden_size: int) -> None:
        super().__init__()
        self.decoder = decoder
        width = decoder.get_input_embeddings().weight.shape[1]
        self.input_layer = nn.Identity() if width == hidden_size else nn.Linear(hidden_size, width)

    def log_probabilities(self, inputs: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities (M, W) of `tokens`, which the last W + 1 of the inputs `(M, c + W, d)`
        but the very last predict; 0 where `mask` `(M, W)` is False."""
        width = tokens.shape[1]
        group = inputs.shape[1] - width
        read = functional.pad(mask, (group, 0), value=True)
        positions = torch.arange(inputs.shape[1], device=inputs.device) + self.first_position
        hidden = self.decoder.base_model(
            inputs_embeds=self.input_layer(inputs),
            attention_mask=read.long(),
            position_ids=positions.expand(len(inputs), -1),
            use_cache=False,
        ).last_hidden_state[:, group - 1 : -1]
        logits = self.decoder.get_output_embeddings()(hidden[mask])
        logits = adjusted_logits(self.decoder, logits).float()
        losses = functional.cross_entropy(logits, tokens[mask], reduction="none")
        return torch.zeros(mask.shape, device=inputs.device).masked_scatter(mask, -losses)


@dataclass(frozen=True)
class StepBatch:
    """What a step decoder reads of a batch `(B, T)`: all texts of all rows, side by side.

    `places` `(M, c)` are the flat positions whose states become the latent inputs of a text;
    `tokens` `(M, W)` the texts, True in `mask`; `slots` (M,) says which of a row's groups a text
    belongs to, 0 to `slot_count` - 1.
    """

    places: Tensor
    tokens: Tensor
    mask: Tensor
    slots: Tensor
    slot_count: int
    rows: int

    @classmethod
    def plan(
        cls,
        input_ids: Tensor,
        texts: Sequence[Sequence[Sequence[int]]],
        special: SpecialIds,
        group: int = 1,
    ) -> StepBatch | None:
        """From ids `(B, T)` on the host and the rows' texts; None where there is none.

        The states at START and CONTINUE become latent inputs, `group` of them for each text; the
        last of them is one that the host itself does not read. Raises `ValueError` where a row has
        more texts than groups.
        """
        thinking = (input_ids == special.start_id) | (input_ids == special.continue_id)
        places, tokens, slots = [], [], []
        for row, row_texts in enumerate(texts):
            columns = thinking[row].nonzero()[:, 0] + row * input_ids.shape[1]
            if len(row_texts) * group > len(columns):
                raise ValueError(
                    f"row {row} has {len(row_texts)} texts for {len(columns)} latent inputs in "
                    f"groups of {group}"
                )
            for slot, text in enumerate(row_texts):
                if text:
                    places.append(columns[slot * group : (slot + 1) * group])
                    tokens.append(torch.tensor(text))
                    slots.append(slot)
        if not tokens:
            return None
        padded = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        lengths = torch.tensor([len(text) for text in tokens])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return cls(
            torch.stack(places), padded, mask, torch.tensor(slots), max(slots) + 1, len(input_ids)
        )


def step_loss(
    host: LatentReasoner,
    last_hidden: Tensor,
    batch: StepBatch | None,
    normalise: Literal["tokens", "rows"],
) -> Tensor:
    """The mean over groups of the loss of their texts, which is a sum over labels divided by the
    number of `tokens` that the group's texts have in the batch, or by the batch's number of `rows`.

    `last_hidden` `(B, T, d)` are the states of the host, to which the decoder is attached. 0 where
    there is no text at all.
    """
    if batch is None:
        return last_hidden.new_zeros(())
    latents = host.latent_input(last_hidden.flatten(0, 1)[batch.places])
    inputs = torch.cat([latents, host.embed(batch.tokens).to(latents.dtype)], 1)
    losses = -step_decoder_of(host).log_probabilities(inputs, batch.mask, batch.tokens).sum(1)
    sums = losses.new_zeros(batch.slot_count).index_add(0, batch.slots, losses)
    counts = torch.zeros_like(sums).index_add(0, batch.slots, batch.mask.sum(1).to(sums.dtype))
    by_slot = sums / (counts.clamp(min=1) if normalise == "tokens" else batch.rows)
    return by_slot.sum() / (counts > 0).sum()


def attach_step_decoder(host: LatentReasoner, decoder: PreTrainedModel) -> None:
    """Let `decoder` be trained with `host`, in place."""
    size = host.base.get_input_embeddings().weight.shape[1]
    host.add_module(NAME, StepDecoder(decoder.requires_grad_(True), size).to(host.device))


def detach_step_decoder(host: LatentReasoner) -> None:
    """Forget the decoder, if there is one, in place: it is no part of a finished model."""
    host._modules.pop(NAME, None)


def step_decoder_of(host: LatentReasoner) -> StepDecoder | None:
    """The decoder that is trained with `host`, if there is one."""
    return host._modules.get(NAME)
