"""Training examples: token ids, from which labels and maps are computed on demand.

An example keeps only its ids and four numbers, so that the 327,777 latent examples of the paper's
SFT take less than 1 GB. `data.sequences` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latent_reasoning.data.rows import DataError

IGNORED_LABEL = -100
Ids = Sequence[int] | np.ndarray
"""Token ids, (T,)."""
SEPARATORS = 4
"""Separators between the five pieces, which the public code counts in its token limit."""


@dataclass(frozen=True, slots=True)
class PlainExample:
    """A sequence of text: question, reasoning, answer.

    Attributes:
        input_ids: ids of the whole sequence, BOS and EOS included, int32 (T,).
        question_length: ids before the reasoning.
        reasoning_length: ids of the reasoning, 0 if there is none.
        first_label: position of the first id that is learned.
        target_position: where hidden states are distilled (` The answer is:`, or one later).
        step_texts: what a step decoder has to write of its latent inputs (`data.step_texts`).
    """

    input_ids: np.ndarray
    question_length: int
    reasoning_length: int
    first_label: int
    target_position: int
    step_texts: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> np.ndarray:
        """The ids with -100 before `first_label`, int64 (T,); not shifted."""
        labels = self.input_ids.astype(np.int64)
        labels[: self.first_label] = IGNORED_LABEL
        return labels

    @property
    def reasoning_map(self) -> np.ndarray:
        """True at the reasoning, START and STOP included, bool (T,)."""
        return self._map(self.question_length, self.question_length + self.reasoning_length)

    @property
    def target_token_map(self) -> np.ndarray:
        """True at the target token alone, bool (T,)."""
        return self._map(self.target_position, self.target_position + 1)

    def _map(self, start: int, end: int) -> np.ndarray:
        positions = np.zeros(len(self.input_ids), dtype=bool)
        positions[start:end] = True
        return positions


@dataclass(frozen=True, slots=True)
class StudentExample(PlainExample):
    """A sequence that reasons in latent steps.

    Attributes:
        stop_label: the label at STOP's position, if it is not STOP: a row that answers early
            (random readout) is still taught to continue.
    """

    stop_label: int | None = None

    @property
    def labels(self) -> np.ndarray:
        """As for plain text, but for `stop_label`; int64 (T,)."""
        labels = PlainExample.labels.fget(self)  # type: ignore[attr-defined]  # slots: no super()
        stop = self.question_length + self.reasoning_length - 1
        if self.stop_label is not None and stop >= self.first_label:
            labels[stop] = self.stop_label
        return labels

    @property
    def continue_map(self) -> np.ndarray:
        """True at the CONTINUE positions, bool (T,)."""
        end = self.question_length + self.reasoning_length
        return self._map(self.question_length + 1, end - 1)


@dataclass(frozen=True, slots=True)
class LatentExample:
    """One row as the teacher and as the student read it."""

    teacher: PlainExample
    student: StudentExample


@dataclass(frozen=True, slots=True)
class StagedRow:
    """A row of which a curriculum leaves out more and more of the reasoning.

    Attributes:
        question: ids before the reasoning, BOS included.
        texts: ids of the reasoning without its first 0, 1, .., K steps; the last one is empty.
        ending: ids of ` The answer is`, `:` and the answer, EOS included.
        answer_length: ids of the answer and EOS alone.
        step_ids: ids of each step, tokenised apart; None where no step decoder needs them.
    """

    question: Ids
    texts: Sequence[Ids]
    ending: Ids
    answer_length: int
    step_ids: Sequence[Sequence[int]] | None = None

    @property
    def steps(self) -> int:
        """K, the number of reasoning steps."""
        return len(self.texts) - 1

    def example(self, run: Ids, text: Ids) -> PlainExample:
        """The row with a latent `run` (START, CONTINUE.., STOP; or nothing) and then `text`.

        All that comes after the run is learned.
        """
        parts = (self.question, run, text, self.ending)
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        return PlainExample(
            input_ids=ids,
            question_length=len(self.question),
            reasoning_length=len(run) + len(text),
            first_label=len(self.question) + len(run),
            target_position=len(ids) - self.answer_length - 1,
        )


def within_limit(example: PlainExample | LatentExample, max_tokens: int | None) -> bool:
    """SFT's length limit, for both sequences of a latent example (note 5: 508 for 512)."""
    if max_tokens is None:
        return True
    if isinstance(example, LatentExample):
        length = max(len(example.teacher), len(example.student))
    else:
        length = len(example)
    return length + SEPARATORS <= max_tokens


def short_enough(examples: Sequence[PlainExample], max_tokens: int | None) -> list[PlainExample]:
    """The examples within SFT's length limit; raises `DataError` where none is left."""
    kept = [example for example in examples if within_limit(example, max_tokens)]
    if not kept:
        raise DataError(
            f"all {len(examples)} rows are longer than data.max_tokens: {max_tokens} allows"
        )
    return kept
