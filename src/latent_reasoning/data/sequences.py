"""The only place where rows become token sequences (docs/method.md, section 2).

A training example is five pieces, each tokenised apart so that no token crosses a border (note 2
there), but with no space that a tokenizer puts before every text (`data.context`):

    {prefix}{question} | {reasoning} | ` The answer is` | `:` | ` {answer}`{eos}

`reasoning` is a text, mostly the steps (`encode_plain_rows`), or START, n CONTINUE, STOP (the
student of `encode_latent_rows`, whose teacher is the plain form of the same row). BOS stands where
the tokenizer itself puts it.

Texts are tokenised in batches, hence functions of many rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from latent_reasoning.config import LatentSteps
from latent_reasoning.data.context import name_of, read_pieces, read_whole
from latent_reasoning.data.examples import (
    LatentExample,
    PlainExample,
    StagedRow,
    StudentExample,
)
from latent_reasoning.data.rows import DataError, Row

if TYPE_CHECKING:  # seconds to import, and the stage prepare_data has no tokenizer
    from transformers import PreTrainedTokenizerBase

START = "<START>"
END = "<END>"
CONTINUE = "<|CONTINUE|>"
STOP = "<|STOP|>"
SPECIAL_TOKENS = (START, END, CONTINUE, STOP)

ANSWER_WORDS = " The answer is"
COLON = ":"
ANSWER_PREFIX = ANSWER_WORDS + COLON

Example = TypeVar("Example", bound=PlainExample)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the four latent tokens; END is only read at STOP's place, never predicted."""

    start: int
    end: int
    continue_: int
    stop: int


# ------------------------------------------------------------------------------------- tokenizer


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Ids of START, END, CONTINUE and STOP.

    Raises:
        DataError: the tokenizer lacks one of them.
    """
    missing = missing_special_tokens(tokenizer)
    if missing:
        raise DataError(
            f"the tokenizer {name_of(tokenizer)} lacks the special tokens "
            f"{', '.join(missing)}: it is not a latent model's; start latent_sft from this model, "
            "which adds them"
        )
    return SpecialTokens(*(tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS))


def missing_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Those of START, END, CONTINUE and STOP that the tokenizer lacks."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return [token for token, i in ids.items() if i is None or i == tokenizer.unk_token_id]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts before every text: BOS, or none (GPT-2)."""
    probe = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for position in range(len(ids)):
        if ids[position : position + len(probe)] == probe:
            return ids[:position]
    return []


def special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer reads as one special token, the four latent ones included."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*SPECIAL_TOKENS, *tokenizer.all_special_tokens, *added} - {""})


def apply_special_token_policy(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    policy: Literal["error", "skip", "escape", "keep"],
) -> tuple[list[Row], int]:
    """Deal with literal special-token text in rows, which a tokenizer would read as the token.

    `error` refuses; `skip` leaves the row out; `escape` puts a space after the text's first
    character (`< START>`); `keep` does nothing, as in the public code.

    Returns the rows and the number left out.

    Raises:
        DataError: with policy `error`, naming the row and the text.
    """
    if policy == "keep":
        return list(rows), 0
    pattern = re.compile("|".join(map(re.escape, special_texts(tokenizer))))
    kept, skipped = [], 0
    for row in rows:
        found = next(filter(None, map(pattern.search, _texts(row))), None)
        if found is None:
            kept.append(row)
        elif policy == "error":
            raise DataError(
                f"row {row.id}: its text holds {found.group()!r}, which the tokenizer would read "
                "as the special token; data.special_token_text (evaluation --path: "
                "--special-token-text) may skip such rows, escape or keep the text"
            )
        elif policy == "escape":
            kept.append(_escape(row, pattern))
        else:
            skipped += 1
    return kept, skipped


def _texts(row: Row) -> tuple[str, ...]:
    return (row.question, *(row.steps or ()), row.answer)


def _escape(row: Row, pattern: re.Pattern[str]) -> Row:
    def broken(text: str) -> str:
        return pattern.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", text)

    steps = None if row.steps is None else tuple(map(broken, row.steps))
    return replace(row, question=broken(row.question), steps=steps, answer=broken(row.answer))


# ---------------------------------------------------------------------------------------- pieces


def reasoning_steps(row: Row, *, drop_last_step: bool) -> tuple[str, ...]:
    """The steps of a row, all or all but the last.

    Raises:
        DataError: the row's steps are unknown.
    """
    if row.steps is None:
        raise DataError(f"row {row.id} has no steps: only the form no_cot can use it")
    return row.steps[:-1] if drop_last_step else row.steps


def reasoning_text(
    row: Row, *, natural_language: bool = False, drop_last_step: bool = False
) -> str:
    """The steps joined without a separator, or each after a space if they are sentences.

    Raises:
        DataError: the row's steps are unknown.
    """
    steps = reasoning_steps(row, drop_last_step=drop_last_step)
    return "".join(f" {step}" for step in steps) if natural_language else "".join(steps)


def latent_step_count(k: int, steps: LatentSteps) -> int:
    """n = min(max, max(min, factor * k + bias)) latent steps for k reasoning steps, at least 0."""
    count = steps.factor * k + steps.bias
    if steps.min is not None:
        count = max(steps.min, count)
    if steps.max is not None:
        count = min(steps.max, count)
    return max(0, count)


def reasoning_step_count(row: Row, *, drop_last_step: bool) -> int:
    """k, the number of steps; if the last is dropped, a row without any counts as one (note 6)."""
    return max(len(row.steps or ()), 1 if drop_last_step else 0)


# -------------------------------------------------------------------------------- training text


def encode_plain_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    reasonings: Sequence[str],
) -> list[PlainExample]:
    """Rows as text.

    Args:
        rows: the rows.
        tokenizer: its EOS ends each example.
        prefix: text before the question.
        reasonings: text before the answer, one per row; empty for an immediate answer.

    Raises:
        DataError: a tokenizer without EOS.
    """
    pieces = _Pieces.of(tokenizer)
    return [
        pieces.join(question, reasoning, answer, len(question), PlainExample)
        for question, reasoning, answer in pieces.encode(rows, prefix, reasonings)
    ]


def encode_latent_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    reasonings: Sequence[str],
    steps: LatentSteps,
    drop_last_step: bool,
    shift_target: bool,
    mask_latent_labels: bool,
    learn_start: bool,
    readout: Callable[[Row, int], int] | None = None,
) -> list[LatentExample]:
    """Rows for teacher (text) and student (START, n CONTINUE, STOP).

    Args:
        rows: the rows.
        tokenizer: has EOS and the four latent tokens.
        prefix: text before the question.
        reasonings: the teacher's text before the answer, one per row.
        steps: the rule for a row's number of latent steps.
        drop_last_step: the teacher's text leaves the last step out (see `reasoning_step_count`).
        shift_target: the target token is the one after `:`, not `:`.
        mask_latent_labels: the student learns only the answer.
        learn_start: START is a label too, on the question's last token (note 7).
        readout: from a row and its n to the number of steps after which the student answers
            (None: n). Its stop decisions are still taught to reach n.

    Raises:
        DataError: a tokenizer that lacks a token.
    """
    special, pieces = special_token_ids(tokenizer), _Pieces.of(tokenizer)
    examples = []
    for row, (question, reasoning, answer) in zip(
        rows, pieces.encode(rows, prefix, reasonings), strict=True
    ):
        n = latent_step_count(reasoning_step_count(row, drop_last_step=drop_last_step), steps)
        taken = n if readout is None else readout(row, n)
        latent = latent_run(taken, special)
        start = len(question)
        first = start + (len(latent) if mask_latent_labels else int(not learn_start))
        teacher = pieces.join(question, reasoning, answer, start, PlainExample, shift_target)
        student = pieces.join(question, latent, answer, first, StudentExample, shift_target)
        if taken < n:
            student = replace(student, stop_label=special.continue_)
        examples.append(LatentExample(teacher, student))
    return examples


def encode_staged_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    natural_language: bool = False,
) -> list[StagedRow]:
    """Rows whose reasoning a curriculum shortens: as text, without the first 0, 1, .., K steps.

    Raises:
        DataError: a row's steps are unknown, or a tokenizer without EOS.
    """
    pieces = _Pieces.of(tokenizer)
    remainders = [
        [
            reasoning_text(replace(row, steps=steps[first:]), natural_language=natural_language)
            for first in range(len(steps) + 1)
        ]
        for row in rows
        for steps in [reasoning_steps(row, drop_last_step=False)]
    ]
    texts = read_pieces(tokenizer, (text for texts in remainders for text in texts))
    return [
        StagedRow(
            np.array(question, dtype=np.int32),
            [np.array(next(texts), dtype=np.int32) for _ in own],
            np.array([*pieces.answer_words, *pieces.colon, *answer], dtype=np.int32),
            len(answer),
        )
        for own, (question, _, answer) in zip(
            remainders, pieces.encode(rows, prefix, [""] * len(rows)), strict=True
        )
    ]


def latent_run(n: int, special: SpecialTokens) -> list[int]:
    """START, `n` CONTINUE, STOP."""
    return [special.start, *[special.continue_] * n, special.stop]


# --------------------------------------------------------------------------------------- prompts


def encode_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: str,
    latent: bool,
    forced_steps: int | None = None,
    suffix: str = "",
    announcement: str | None = None,
) -> list[list[int]]:
    """Prompts of evaluation and RL: the question, and START for a latent model.

    With `forced_steps` = n the whole latent run and ` The answer is:` follow, so that only the
    answer is left to decode. A model that cannot think has only n = 0: question and
    ` The answer is:`. `suffix` stands after each question, and is tokenised with it
    (`LatentSettings.suffix`). `announcement` replaces ` The answer is:` (`answer_text` there).

    Raises:
        DataError: latent without the special tokens, or `forced_steps` > 0 without latent.
    """
    if forced_steps and not latent:
        raise DataError(f"forced_steps is {forced_steps}, but a model that cannot think has only 0")
    end: list[int] = []
    if latent:
        special = special_token_ids(tokenizer)
        end = [special.start] if forced_steps is None else latent_run(forced_steps, special)
    if forced_steps is not None:
        words = [ANSWER_WORDS, COLON] if announcement is None else [announcement]
        end = [*end, *chain.from_iterable(read_pieces(tokenizer, words))]
    first = beginning(tokenizer)
    questions = (prefix + row.question + suffix for row in rows)
    return [[*first, *ids, *end] for ids in read_whole(tokenizer, questions)]


# -------------------------------------------------------------------------------------- internal


@dataclass(frozen=True)
class _Pieces:
    """The pieces that are the same in every row, and the tokenizer for the rest."""

    tokenizer: PreTrainedTokenizerBase
    first: list[int]
    answer_words: list[int]
    colon: list[int]
    eos: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Pieces:
        if tokenizer.eos_token_id is None:
            raise DataError(f"the tokenizer {name_of(tokenizer)} has no EOS token")
        words, colon = read_pieces(tokenizer, [ANSWER_WORDS, COLON])
        return cls(tokenizer, beginning(tokenizer), words, colon, tokenizer.eos_token_id)

    def encode(
        self, rows: Iterable[Row], prefix: str, reasonings: Iterable[str]
    ) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Ids of question (BOS before it), reasoning and answer (EOS after it) of each row."""
        rows = list(rows)
        questions = read_whole(self.tokenizer, (prefix + row.question for row in rows))
        texts = read_pieces(self.tokenizer, reasonings)
        answers = read_pieces(self.tokenizer, (f" {row.answer}" for row in rows))
        for question, reasoning, answer in zip(questions, texts, answers, strict=True):
            yield self.first + question, reasoning, [*answer, self.eos]

    def join(
        self,
        question: list[int],
        reasoning: list[int],
        answer: list[int],
        first_label: int,
        kind: Callable[..., Example],
        shift_target: bool = False,
    ) -> Example:
        before_answer = question + reasoning + self.answer_words + self.colon
        return kind(
            input_ids=np.array(before_answer + answer, dtype=np.int32),
            question_length=len(question),
            reasoning_length=len(reasoning),
            first_label=first_label,
            target_position=len(before_answer) - (0 if shift_target else 1),
        )
