"""From rows to examples: forms of text, rows left out, and random readout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latent_reasoning.config import Data, LatentSftModel, SftModel, Training
from latent_reasoning.data.examples import IGNORED_LABEL
from latent_reasoning.data.rows import DataError
from latent_reasoning.sft.examples import (
    latent_examples,
    random_readout,
    token_sft_examples,
    without_negative_answers,
)

TRAINING = Training(steps=4, batch_size=20)


def examples_of(rows, tokenizer, form="cot", **data):
    return token_sft_examples(rows, tokenizer, SftModel(form=form, training=TRAINING), Data(**data))


def test_cot_learns_steps_and_answer_and_no_cot_the_answer_alone(rows, tokenizer):
    for form, wanted in (("cot", "".join(rows[0].steps)), ("no_cot", "")):
        example = examples_of(rows[:1], tokenizer, form)[0]
        learned = [token for token in example.labels if token != IGNORED_LABEL]
        text = tokenizer.decode(learned, clean_up_tokenization_spaces=False)
        assert text == f"{wanted} The answer is: {rows[0].answer}<|eot_id|>"


def test_rows_above_the_token_limit_are_dropped_and_none_left_is_an_error(rows, tokenizer):
    lengths = sorted(len(e) for e in examples_of(rows, tokenizer))
    kept = examples_of(rows, tokenizer, max_tokens=lengths[5] + 4)
    assert max(len(e) for e in kept) == lengths[5]
    with pytest.raises(DataError, match=r"longer than data\.max_tokens: 9"):
        examples_of(rows, tokenizer, max_tokens=9)


def test_latent_examples_above_the_limit_are_dropped_and_none_left_is_an_error(
    rows, tokenizer, latent_model
):
    def kept(**data):
        entry = LatentSftModel(training=TRAINING)
        return latent_examples(rows, tokenizer, entry, Data(**data), name="latent-6", seed=0)

    lengths = [max(len(e.teacher), len(e.student)) for e in kept()]
    limit = sorted(lengths)[5] + 4
    assert len(kept(max_tokens=limit)) == sum(length + 4 <= limit for length in lengths)
    with pytest.raises(DataError, match=r"no row of 24 is left for latent-6.*max_tokens: 9"):
        kept(max_tokens=9)


def test_latent_sft_drops_negative_answers_unless_told_otherwise(rows):
    rows = [replace(rows[0], answer=answer) for answer in ("-1", "-0", "3")]
    assert without_negative_answers(rows, Data()) == rows[1:]
    assert without_negative_answers(rows, Data(drop_negative_for_sft=False)) == rows


def test_a_share_of_the_rows_answers_between_the_teachers_steps_and_n(rows):
    def taken(share: float, n: int) -> list[int]:
        readout = random_readout(LatentSftModel(training=TRAINING, random_readout=share), seed=0)
        return [readout(replace(row, id=f"{row.id}-{i}"), n) for row in rows for i in range(20)]

    assert set(taken(0.0, 6)) == {6}
    steps_in_text = [len(row.steps) - 1 for row in rows for _ in range(20)]
    early = taken(1.0, 6)
    assert all(least <= n <= 6 for least, n in zip(steps_in_text, early, strict=True))
    assert set(early) == set(range(7))
    assert set(taken(1.0, 0)) == {0}
    assert taken(1.0, 6) == early
    assert 0.3 < sum(n < 6 for n in taken(0.5, 6)) / len(early) < 0.5
