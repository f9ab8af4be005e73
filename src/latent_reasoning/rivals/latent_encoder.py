"""Latent-SFT's first stage: an encoder learns the mixtures that stand for a chain of thought.

The encoder reads the chain of thought with a compress token after every `rate` tokens; its state
there, as scores over the decoder's words, makes a mixture. The decoder reads these mixtures, and
has to write the `rate` tokens after each from it alone, and the answer from the question and all of
them (arXiv 2510.15522; docs/rivals.md).

B rows, T columns, M latent steps, k words in a mixture, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional

from latent_reasoning.data.examples import IGNORED_LABEL
from latent_reasoning.model.mixtures import Mixture, likeliest
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.special_rows import embedding_matrix, ids_on


class Place(IntEnum):
    """What a column of the decoder holds."""

    PADDING = 0
    PROMPT = 1
    """The question and the start of thinking."""
    LATENT = 2
    TEXT = 3
    """A part of the chain of thought, after a latent step."""
    ANSWER = 4
    """The end of thinking, and what follows."""


@dataclass(frozen=True)
class CompressedRow:
    """One row: what the encoder reads, and what the decoder does, at each latent step the id of the
    compress token; `places` are the decoder's `Place`s."""

    encoder_ids: list[int]
    decoder_ids: list[int]
    places: list[int]


def compressed_row(
    prompt: Sequence[int],
    reasoning: Sequence[int],
    end: Sequence[int],
    answer: Sequence[int],
    *,
    rate: int,
    compress_id: int,
) -> CompressedRow:
    """A row of ids: `prompt` ends with the start of thinking, `answer` with EOS, and `end` is the
    end of thinking. A compress token stands after every `rate` tokens of the reasoning, and after a
    shorter rest. The decoder does not read the first `rate` tokens: only the first latent step
    tells of them."""
    chain: list[int] = []
    for first in range(0, len(reasoning), rate):
        chain += [*reasoning[first : first + rate], compress_id]
    rest = chain[min(rate, len(reasoning)) :]
    places = [
        *[Place.PROMPT] * len(prompt),
        *(Place.LATENT if token == compress_id else Place.TEXT for token in rest),
        *[Place.ANSWER] * (len(end) + len(answer)),
    ]
    return CompressedRow(
        encoder_ids=[*prompt, *chain, *end],
        decoder_ids=[*prompt, *rest, *end, *answer],
        places=[int(place) for place in places],
    )


@dataclass(frozen=True)
class CompressedBatch:
    """Rows padded on the right: ids of the encoder (B, T_c) and of the decoder (B, T)."""

    encoder_ids: Tensor
    encoder_mask: Tensor
    is_compress: Tensor
    decoder_ids: Tensor
    places: Tensor

    @classmethod
    def of(cls, rows: Sequence[CompressedRow], compress_id: int, pad_id: int) -> CompressedBatch:
        """Collate rows."""
        encoder_ids = _padded([row.encoder_ids for row in rows], pad_id)
        lengths = torch.tensor([len(row.encoder_ids) for row in rows])
        mask = torch.arange(encoder_ids.shape[1]) < lengths[:, None]
        return cls(
            encoder_ids,
            mask,
            mask & (encoder_ids == compress_id),
            _padded([row.decoder_ids for row in rows], pad_id),
            _padded([row.places for row in rows], int(Place.PADDING)),
        )

    @property
    def labels(self) -> Tensor:
        """What the decoder learns, (B, T), not shifted: text, the end of thinking, the answer."""
        is_label = (self.places == Place.TEXT) | (self.places == Place.ANSWER)
        return torch.where(is_label, self.decoder_ids, IGNORED_LABEL)

    @property
    def positions(self) -> Tensor:
        """The decoder's positions (B, T). Latent steps are numbered after the prompt as if no text
        stood between them; text goes on from its latent step, the answer from what is before it."""
        positions = torch.zeros_like(self.places)
        for row, places in enumerate(self.places.tolist()):
            latents, last = 0, -1
            for column, place in enumerate(places):
                if place == Place.PADDING:
                    break
                last += 1
                if place == Place.LATENT:
                    last = places.count(Place.PROMPT) + latents
                    latents += 1
                positions[row, column] = last
        return positions


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def _causal(mask: Tensor) -> Tensor:
    """(B, T, T): each real column sees itself and the real ones before it."""
    return (mask[:, :, None] & mask[:, None]).tril()


def induction_mask(is_compress: Tensor, mask: Tensor) -> Tensor:
    """What each column of the encoder sees, bool `(B, T, T)`: all before it but compress tokens."""
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return _causal(mask) & (~is_compress[:, None] | itself)


def supervision_mask(places: Tensor) -> Tensor:
    """What each column of the decoder sees, bool `(B, T, T)`, of those before it and itself.

    A prompt's: the prompt. A latent step: prompt and latent steps. Text: its own latent step and
    the text since then, not the question. The answer: all but text.
    """
    is_text = places == Place.TEXT
    run = (places == Place.LATENT).cumsum(1)
    same_run = (run[:, :, None] == run[:, None]) & (places != Place.PROMPT)[:, None]
    seen = torch.where(is_text[:, :, None], same_run, ~is_text[:, None])
    return _causal(places != Place.PADDING) & seen


def masked_states(
    model: LatentReasoner, inputs: Tensor, visible: Tensor, positions: Tensor
) -> Tensor:
    """States `(B, T, d)` of inputs `(B, T, d)` whose columns see what is `visible` `(B, T, T)`.

    States at padding mean nothing.
    """
    lowest = torch.finfo(inputs.dtype).min
    bias = torch.zeros(visible.shape, dtype=inputs.dtype, device=inputs.device)
    output = model.base.base_model(
        inputs_embeds=inputs,
        attention_mask=bias.masked_fill(~visible, lowest).unsqueeze(1),
        position_ids=positions,
        use_cache=False,
    )
    return output.last_hidden_state


def encoded_mixtures(
    encoder: LatentReasoner,
    decoder: LatentReasoner,
    batch: CompressedBatch,
    size: int,
    excluded: Sequence[int] = (),
) -> Mixture:
    """The mixtures (M, k) of a batch's latent steps, row by row: of the decoder's words, the
    likeliest by their embeddings' products with the encoder's states, without the ids `excluded`.
    The decoder's embeddings are constants here."""
    mask = batch.encoder_mask
    visible = induction_mask(batch.is_compress, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = masked_states(encoder, encoder.embed(batch.encoder_ids), visible, positions)
    scores = hidden[batch.is_compress] @ _words(decoder).detach().T
    if excluded:
        scores = scores.index_fill(-1, ids_on(scores.device, *excluded), float("-inf"))
    return likeliest(scores, size)


def decoder_states(decoder: LatentReasoner, batch: CompressedBatch, mixtures: Mixture) -> Tensor:
    """The decoder's states `(B, T, d)`, its latent steps fed with mixtures (M, k), in which the
    embeddings are constants."""
    inputs = decoder.embed(batch.decoder_ids)
    latent = mixtures.embed(_words(decoder).detach()).to(inputs.dtype)
    inputs = inputs.index_put((batch.places == Place.LATENT).nonzero(as_tuple=True), latent)
    visible = supervision_mask(batch.places)
    return masked_states(decoder, inputs, visible, batch.positions.to(inputs.device))


def decoder_loss(decoder: LatentReasoner, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of labels `(B, T)` after states `(B, T, d)`, and the logits."""
    logits = decoder.vocabulary_logits(hidden)
    flat = logits[:, :-1].flatten(0, 1).float()
    return functional.cross_entropy(flat, labels[:, 1:].flatten()), logits


def _words(model: LatentReasoner) -> Tensor:
    return embedding_matrix(model.base, model.settings, model.special_rows)
