"""The sequences whose inside is captured: whole inputs, and what stands at each column.

For a latent model: the question, START, the latents that a row makes by itself, and its own answer,
read again in one pass with the latents' inputs as they were. For a plain model: texts.

B rows, T columns, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latent_reasoning.data.context import read_pieces, read_whole
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import ANSWER_PREFIX, beginning, reasoning_text
from latent_reasoning.inside.reasoning import Reasoning, Subject

STATES_AT_ONCE = 2**25
"""Captured numbers in memory at once: 128 MiB in float32."""
LONGEST = 256
"""Texts are cut here."""


class Place(IntEnum):
    """What stands at a column."""

    PADDING = 0
    QUESTION = 1
    START = 2
    LATENT = 3
    ANSWER = 4


@dataclass(frozen=True)
class Batch:
    """Sequences of `rows` (B,), padded on the right: no column sees padding.

    `inputs` (B, T, d); `places` (B, T) of `Place`; `step` (B, T) is j at START (0) and latents, -1
    elsewhere; `operations` (B,) is K.
    """

    rows: Tensor
    inputs: Tensor
    places: Tensor
    step: Tensor
    operations: Tensor

    @property
    def mask(self) -> Tensor:
        return self.places != Place.PADDING

    @property
    def positions(self) -> Tensor:
        """The position of each column in its row, from 0 on; -1 at padding."""
        return torch.where(self.mask, self.mask.long().cumsum(1) - 1, -1)


@dataclass(frozen=True)
class Text:
    """One row's ids, with the inputs of its latents (n, d), which stand after the first START."""

    before: list[int]
    latents: Tensor | None
    after: list[int]
    operations: int = 0


def latent_sequences(subject: Subject, reasoning: Reasoning) -> list[Text]:
    """Question and START, the row's own latents, STOP and its own answer."""
    ending, made = subject.ending(), []
    for i, n in enumerate(reasoning.steps.tolist()):
        answer = ending + reasoning.ids[i][n]
        operations = len(reasoning.equations[i])
        made.append(Text(reasoning.prompts[i], reasoning.inputs[i, :n], answer, operations))
    return made


def row_sequences(subject: Subject, rows: Sequence[Row]) -> list[Text]:
    """Question, and steps and answer as text."""
    first = beginning(subject.tokenizer)
    questions = read_whole(subject.tokenizer, [subject.prefix + row.question for row in rows])
    texts = (
        f"{reasoning_text(row) if row.steps else ''}{ANSWER_PREFIX} {row.answer}" for row in rows
    )
    pairs = zip(rows, questions, read_pieces(subject.tokenizer, texts), strict=True)
    return [
        Text((first + question)[:LONGEST], None, after[:LONGEST], len(row.steps or ()))
        for row, question, after in pairs
    ]


def text_sequences(subject: Subject, texts: Sequence[str]) -> list[Text]:
    """Any texts, cut at `LONGEST` tokens."""
    first = beginning(subject.tokenizer)
    every = read_whole(subject.tokenizer, texts)
    return [Text((first + ids)[:LONGEST], None, []) for ids in every if ids]


@torch.no_grad()
def batched(subject: Subject, sequences: Sequence[Text], blocks: int) -> Iterator[Batch]:
    """The sequences in batches that bound the memory of captured states."""
    longest = max(map(length_of, sequences))
    hidden = subject.model.base.config.hidden_size
    size = STATES_AT_ONCE // (longest * hidden * (6 * blocks + 2))
    size = min(max(1, size), subject.batch)
    for start in range(0, len(sequences), size):
        yield _batch(subject, sequences[start : start + size], start)


def length_of(text: Text) -> int:
    """Its columns."""
    return len(text.before) + len(text.after) + (0 if text.latents is None else len(text.latents))


def _batch(subject: Subject, sequences: Sequence[Text], start: int) -> Batch:
    inputs, places, steps = zip(*(_columns(subject, text) for text in sequences), strict=True)
    device = subject.model.device
    return Batch(
        torch.arange(start, start + len(sequences)),
        pad_sequence(inputs, batch_first=True),
        pad_sequence(places, batch_first=True, padding_value=Place.PADDING).to(device),
        pad_sequence(steps, batch_first=True, padding_value=-1).to(device),
        torch.tensor([text.operations for text in sequences]),
    )


def _columns(subject: Subject, text: Text) -> tuple[Tensor, Tensor, Tensor]:
    """A text's inputs (T, d), and its places and steps (T,)."""
    model, first = subject.model, len(text.before)
    embedded = model.embed(torch.tensor(text.before + text.after, device=model.device))
    places = torch.full((length_of(text),), int(Place.QUESTION))
    steps = torch.full_like(places, -1)
    places[len(places) - len(text.after) :] = Place.ANSWER
    if text.latents is None:
        return embedded, places, steps
    latents = slice(first, first + len(text.latents))
    places[first - 1], places[latents] = Place.START, Place.LATENT
    steps[first - 1 : latents.stop] = torch.arange(len(text.latents) + 1)
    inputs = torch.cat([embedded[:first], text.latents.to(embedded), embedded[first:]])
    return inputs, places, steps
