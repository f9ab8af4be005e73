"""What is taught is judged right: rows are encoded, decoded and judged before a model is trained.

A tokenizer that cannot keep the text of an answer (one that joins words with spaces, changes case,
or lacks a sign) would give a model that learns well and is called wrong in every row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from latent_reasoning.config import LatentSteps
from latent_reasoning.data.answers import Thinking, is_well_formatted, judge
from latent_reasoning.data.context import decode, name_of, read_pieces
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import (
    ANSWER_PREFIX,
    CONTINUE,
    START,
    STOP,
    beginning,
    encode_latent_rows,
    encode_plain_rows,
    encode_prompts,
    missing_special_tokens,
    reasoning_text,
)

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedTokenizerBase

FORMAT = "format"
"""Id of the row that each tokenizer must keep whole."""

ROWS = (
    Row("steps", "Ann has 1 pen, and gets 2. How many?", ("<<1+2=3>>", "<<3*4=12>>"), "12"),
    Row("negative", "It is 2, and falls by 5.5?", ("<<2-5.5=-3.5>>",), "-3.5"),
    Row("thousands", "600 boxes of 30 cost $18?", ("<<600*30=18,000>>",), "18,000"),
    Row("digits", "A 7th of 798,098?", ("<<798098/7=114014>>", "<<114014-35=113979>>"), "113979"),
    Row("sentences", "Half of 3 pens?", ("Ann has 3 pens.", "Half of 3 is 1.5."), "1.5"),
)
"""Rows to try; those with words or signs that the tokenizer does not know are left out."""

Piece = tuple[Thinking, str, str, str]
"""How a text is judged, the text as it is taught, as it is decoded, and the right answer."""


def check_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose texts, decoded, are not what was taught or are not judged right.

    All forms of training text are tried: with steps, as equations or sentences, and without, the
    answer to a forced prompt, and, where the tokenizer has the special tokens, the latent form.

    Raises:
        DataError: naming the tokenizer and the text.
    """
    for row in (_format_row(tokenizer), *ROWS):
        for thinking, taught, decoded, answer in _texts(tokenizer, row):
            if row.id != FORMAT and not set(taught) <= set(decoded):
                break
            right = decoded == taught and judge(answer, decoded, thinking).correct
            if not right or (thinking == "latent" and not is_well_formatted(decoded)):
                raise DataError(
                    f"the tokenizer {name_of(tokenizer)} reads {taught!r} and gives {decoded!r} "
                    "back, so that right answers would be judged wrong; use a base model whose "
                    "tokenizer keeps text as it is"
                )


def check_answers(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]) -> None:
    """Refuse rows whose answers the tokenizer reads in part: some lack a digit, and drop it.

    Raises:
        DataError: naming the first such row. Unknown tokens are no such parts: they are learned.
    """
    by_answer = {f" {row.answer}": row for row in rows}
    pieces = read_pieces(tokenizer, by_answer)
    for (answer, row), ids in zip(by_answer.items(), pieces, strict=True):
        decoded = decode(tokenizer, ids)
        if decoded.split() != answer.split() and tokenizer.unk_token_id not in ids:
            raise DataError(
                f"row {row.id}: the tokenizer {name_of(tokenizer)} has no token for a part of the "
                f"answer {row.answer!r}, and reads {decoded!r}; use another base model, or leave "
                "such rows out"
            )


def _format_row(tokenizer: PreTrainedTokenizerBase) -> Row:
    """A row that must be kept whole; its answer is a digit that the tokenizer has, first 0."""
    for digit in "0123456789":
        with contextlib.suppress(DataError):
            row = Row(FORMAT, digit, (), digit)
            check_answers(tokenizer, [row])
            return row
    return Row(FORMAT, "0", (), "0")


def _texts(tokenizer: PreTrainedTokenizerBase, row: Row) -> Iterator[Piece]:
    """The texts of a row; none where it holds a word that the tokenizer does not know."""
    answer = f"{ANSWER_PREFIX} {row.answer}"
    for reasoning in dict.fromkeys(
        ["", reasoning_text(row), reasoning_text(row, natural_language=True)]
    ):
        (example,) = encode_plain_rows([row], tokenizer, prefix="", reasonings=[reasoning])
        ids = example.input_ids.tolist()
        completion, end = ids[example.question_length : -1], ids[example.target_position + 1 : -1]
        # BOS and EOS, which are left out here, may be the unknown token too (GPT-2, OPT).
        if row.id != FORMAT and tokenizer.unk_token_id in ids[len(beginning(tokenizer)) : -1]:
            return
        yield "text", reasoning + answer, decode(tokenizer, completion), row.answer
        yield "forced", f" {row.answer}", decode(tokenizer, end), row.answer
    if not missing_special_tokens(tokenizer):
        yield from _latent_texts(tokenizer, row, answer)


def _latent_texts(tokenizer: PreTrainedTokenizerBase, row: Row, answer: str) -> Iterator[Piece]:
    (example,) = encode_latent_rows(
        [row],
        tokenizer,
        prefix="",
        reasonings=[""],
        steps=LatentSteps(min=2, max=2),
        drop_last_step=True,
        shift_target=True,
        mask_latent_labels=False,
        learn_start=True,
    )
    (prompt,) = encode_prompts([row], tokenizer, prefix="", latent=True)
    ids = example.student.input_ids.tolist()[:-1]
    taught = 2 * CONTINUE + STOP + answer
    yield "latent", taught, decode(tokenizer, ids[len(prompt) :]), row.answer
    whole = decode(tokenizer, ids[example.student.question_length :])
    yield "latent", START + taught, whole, row.answer
