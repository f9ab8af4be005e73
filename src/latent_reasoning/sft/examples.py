"""From rows to the examples of SFT: what a model reads, and which rows are dropped."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Data, LatentSftModel, SftModel
from latent_reasoning.data.answers import is_negative
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.dial.styles import styled_reasonings
from latent_reasoning.data.examples import (
    LatentExample,
    PlainExample,
    short_enough,
    within_limit,
)
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import (
    encode_latent_rows,
    encode_plain_rows,
    reasoning_steps,
    reasoning_text,
)
from latent_reasoning.data.step_texts import texts_of_inputs
from latent_reasoning.runtime import seeds


def token_sft_examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, entry: SftModel, data: Data
) -> list[PlainExample]:
    """The rows as text: steps and answer (`cot`) or the answer at once (`no_cot`).

    Rows above the token limit are dropped. Raises `DataError` where no row is left.
    """
    reasonings = [
        reasoning_text(row, natural_language=data.natural_language) if entry.form == "cot" else ""
        for row in rows
    ]
    examples = encode_plain_rows(
        rows, tokenizer, prefix=data.prompt.training, reasonings=reasonings
    )
    return short_enough(examples, data.max_tokens)


def without_negative_answers(rows: Sequence[Row], data: Data) -> list[Row]:
    """The rows of latent SFT: without negative answers if `data.drop_negative_for_sft` is set."""
    if not data.drop_negative_for_sft:
        return list(rows)
    return [row for row in rows if not is_negative(row.answer, data.number_rule)]


def latent_examples(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    entry: LatentSftModel,
    data: Data,
    *,
    name: str,
    seed: int,
) -> list[LatentExample]:
    """The rows as teacher and student read them; rows above the token limit are dropped.

    `name` is the model's. Raises `DataError` where no row is left.
    """
    reasonings = styled_reasonings(
        rows,
        entry.teacher_texts,
        seed=seed,
        natural_language=data.natural_language,
        drop_last_step=entry.drop_last_step,
    )
    examples = encode_latent_rows(
        rows,
        tokenizer,
        prefix=data.prompt.training,
        reasonings=reasonings,
        steps=entry.latent_steps,
        drop_last_step=entry.drop_last_step,
        shift_target=entry.shift_target,
        mask_latent_labels=entry.mask_latent_labels,
        learn_start=entry.learn_start,
        readout=random_readout(entry, seed),
    )
    if entry.step_decoder is not None:
        examples = with_step_texts(examples, rows, tokenizer, entry, data)
    kept = [example for example in examples if within_limit(example, data.max_tokens)]
    if not kept:
        raise DataError(
            f"no row of {len(rows)} is left for {name}: answers that are negative and "
            f"sequences longer than data.max_tokens: {data.max_tokens} allows are dropped"
        )
    return kept


def with_step_texts(
    examples: Sequence[LatentExample],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    entry: LatentSftModel,
    data: Data,
) -> list[LatentExample]:
    """The examples of `rows` with the steps that a step decoder writes.

    They are the steps of the teacher's text. The state at the last latent step, which the student
    does not read, stands for a step too.
    """
    steps = step_ids(
        rows,
        tokenizer,
        natural_language=data.natural_language,
        drop_last_step=entry.drop_last_step,
    )
    decoded = []
    for example, own in zip(examples, steps, strict=True):
        inputs = int(example.student.continue_map.sum()) + 1
        texts = texts_of_inputs(own, inputs, tokenizer.eos_token_id)
        student = replace(example.student, step_texts=texts)
        decoded.append(replace(example, student=student))
    return decoded


def step_ids(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    natural_language: bool,
    drop_last_step: bool = False,
) -> list[list[list[int]]]:
    """The ids of the steps of each row, each step tokenised apart."""
    steps = [reasoning_steps(row, drop_last_step=drop_last_step) for row in rows]
    space = " " if natural_language else ""
    ids = iter(read_pieces(tokenizer, [space + step for own in steps for step in own]))
    return [[next(ids) for _ in own] for own in steps]


def random_readout(entry: LatentSftModel, seed: int) -> Callable[[Row, int], int]:
    """The function (row, n) -> the number of the row's n latent steps after which it answers.

    A share of the rows, `random_readout`, answers after a random number of steps, from the number
    of the teacher's steps in text to n; it depends on the seed and the row's id. RL cannot teach a
    model to answer sooner that has only ever answered after n steps.
    """

    def steps(row: Row, n: int) -> int:
        generator = random.Random(seeds.seed_for(seed, seeds.RANDOM_READOUT.format(row=row.id)))
        if generator.random() >= entry.random_readout:
            return n
        steps_in_text = len(row.steps) - entry.drop_last_step
        return generator.randint(min(max(steps_in_text, 0), n), n)

    return steps
