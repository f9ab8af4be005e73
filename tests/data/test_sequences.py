"""Sequences, piece by piece: ids, labels, maps, limits and special-token text."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain

import pytest

from latent_reasoning.config import LatentSteps
from latent_reasoning.data.collation import collate_plain
from latent_reasoning.data.examples import (
    LatentExample,
    PlainExample,
    short_enough,
    within_limit,
)
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import (
    apply_special_token_policy,
    beginning,
    encode_latent_rows,
    encode_plain_rows,
    encode_prompts,
    latent_step_count,
    reasoning_text,
    special_token_ids,
)
from tests.data.conftest import build

ROW = Row("train-0", "How?", ("<<1+1=2>>", "<<2+3=5>>"), "5")
LATENT = {
    "prefix": "Question: ",
    "drop_last_step": True,
    "shift_target": True,
    "mask_latent_labels": False,
    "learn_start": True,
}


def encode_plain(row: Row, tokenizer, reasoning: str | None = None) -> PlainExample:
    texts = [reasoning_text(row) if reasoning is None else reasoning]
    (example,) = encode_plain_rows([row], tokenizer, prefix="Question: ", reasonings=texts)
    return example


def encode_latent(
    row: Row, tokenizer, *, n: int, reasoning: str | None = None, **changes
) -> LatentExample:
    options = LATENT | {"steps": LatentSteps(factor=0, bias=n, min=None, max=None)} | changes
    if reasoning is None:
        reasoning = reasoning_text(row, drop_last_step=options["drop_last_step"])
    (example,) = encode_latent_rows([row], tokenizer, reasonings=[reasoning], **options)
    return example


def prompt_of(row: Row, tokenizer, **options) -> list[int]:
    (prompt,) = encode_prompts([row], tokenizer, **({"prefix": ""} | options))
    return prompt


def text_where(tokenizer, example: PlainExample, positions) -> str:
    return tokenizer.decode(example.input_ids[positions])


def learned(tokenizer, example: PlainExample) -> str:
    return tokenizer.decode([int(label) for label in example.labels if label != -100])


def test_an_example_is_bos_question_reasoning_answer_eos(tokenizer) -> None:
    for reasoning in ("<<1+1=2>><<2+3=5>>", " Results: 2 5", ""):
        example = encode_plain(ROW, tokenizer, reasoning)
        end = f"{reasoning} The answer is: 5<|end|>"
        assert tokenizer.decode(example.input_ids) == f"<|begin|>Question: How?{end}"
        assert text_where(tokenizer, example, example.reasoning_map) == reasoning
        assert learned(tokenizer, example) == end
        assert len(example.labels) == len(example.input_ids) == len(example)


@pytest.mark.parametrize(
    ("options", "reasoning"),
    [
        ({}, "<<1+1=2>><<2+3=5>>"),
        ({"drop_last_step": True}, "<<1+1=2>>"),
        ({"natural_language": True}, " <<1+1=2>> <<2+3=5>>"),
        ({"natural_language": True, "drop_last_step": True}, " <<1+1=2>>"),
    ],
)
def test_the_reasoning_text_of_each_form(options, reasoning) -> None:
    assert reasoning_text(ROW, **options) == reasoning


def test_a_row_of_unknown_steps_has_no_reasoning_text() -> None:
    with pytest.raises(DataError, match="svamp-4 has no steps"):
        reasoning_text(Row("svamp-4", "How?", None, "5"))


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("reasoning", ["<<1+1=2>><<2+3=5>>", ""])
@pytest.mark.parametrize("shift_target", [True, False])
def test_pieces_are_those_of_the_public_code(
    build_tokenizer, adds_bos, reasoning, shift_target
) -> None:
    """The oracle: the public code tokenises one text with separators, and removes them after.

    Merges would join question and step, `is` and `:`, `:` and the answer's space.
    """
    merges = [("s", ":"), (":", "Ġ"), (">", "Ġ"), ("?", "<"), ("Ġ", "5"), ("<", "<")]
    tokenizer = build_tokenizer(merges, adds_bos=adds_bos)
    pieces = ["Question: How?", reasoning, " The answer is", ":", " 5<|end|>"]
    separated = copy.deepcopy(tokenizer)
    separated.add_special_tokens({"additional_special_tokens": ["<DEMARCATE>"]})
    separator = separated.convert_tokens_to_ids("<DEMARCATE>")
    segments: list[list[int]] = [[]]
    for token in separated("<DEMARCATE>".join(pieces))["input_ids"]:
        if token == separator:
            segments.append([])
        else:
            segments[-1].append(token)
    first, second, third, fourth, fifth = segments
    flags = [0] * len(first) + [1] * len(second) + [0] * len(third + fourth + fifth)
    target = len(first + second + third + fourth) - (0 if shift_target else 1)

    teacher = encode_latent(
        ROW, tokenizer, n=1, reasoning=reasoning, shift_target=shift_target
    ).teacher
    assert teacher.input_ids.tolist() == list(chain(*segments))
    assert teacher.reasoning_map.astype(int).tolist() == flags
    assert teacher.target_token_map.nonzero()[0].tolist() == [target]
    assert teacher.labels.tolist() == [-100] * len(first) + list(chain(*segments[1:]))
    plain = encode_plain(ROW, tokenizer, reasoning)
    assert plain.input_ids.tolist() == teacher.input_ids.tolist()
    assert text_where(tokenizer, plain, plain.target_token_map) == ":"


def test_bos_stands_only_where_the_tokenizer_puts_it(build_tokenizer) -> None:
    without = build_tokenizer(adds_bos=False)
    assert beginning(build_tokenizer()) == [0]
    assert beginning(without) == []
    assert prompt_of(ROW, without, latent=False) == without("How?")["input_ids"]


@pytest.mark.parametrize("n", [0, 3])
def test_the_student_thinks_where_the_teacher_reads_steps(tokenizer, n) -> None:
    special = special_token_ids(tokenizer)
    example = encode_latent(ROW, tokenizer, n=n)
    latent = [special.start, *[special.continue_] * n, special.stop]
    student = example.student
    assert student.input_ids[student.reasoning_map].tolist() == latent
    assert student.input_ids[student.continue_map].tolist() == latent[1:-1]
    assert learned(tokenizer, example.teacher) == "<<1+1=2>> The answer is: 5<|end|>"
    assert tokenizer.decode(student.input_ids) == (
        "<|begin|>Question: How?<START>" + "<|CONTINUE|>" * n + "<|STOP|> The answer is: 5<|end|>"
    )


@pytest.mark.parametrize(
    ("options", "first_learned"),
    [
        ({}, "<START><|CONTINUE|><|STOP|> The answer is: 5<|end|>"),
        ({"learn_start": False}, "<|CONTINUE|><|STOP|> The answer is: 5<|end|>"),
        ({"mask_latent_labels": True}, " The answer is: 5<|end|>"),
    ],
)
def test_what_the_student_learns(tokenizer, options, first_learned) -> None:
    student = encode_latent(ROW, tokenizer, n=1, **options).student
    assert learned(tokenizer, student) == first_learned


def test_an_early_readout_answers_early_but_is_taught_to_continue(tokenizer) -> None:
    early = encode_latent(ROW, tokenizer, n=3, readout=lambda row, n: 1).student
    thought = early.reasoning_map
    assert text_where(tokenizer, early, thought) == "<START><|CONTINUE|><|STOP|>"
    assert tokenizer.decode(early.labels[thought]) == "<START><|CONTINUE|><|CONTINUE|>"
    whole = encode_latent(ROW, tokenizer, n=3, readout=lambda row, n: n).student
    assert (whole.labels == encode_latent(ROW, tokenizer, n=3).student.labels).all()


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        (LatentSteps(factor=0, bias=0, min=6, max=6), [6, 6, 6, 6]),
        (LatentSteps(factor=1, bias=5, min=None, max=10), [5, 6, 10, 10]),
        (LatentSteps(factor=2, bias=0, min=3, max=None), [3, 3, 10, 40]),
        (LatentSteps(factor=1, bias=-2, min=None, max=None), [0, 0, 3, 18]),
    ],
)
def test_the_number_of_latent_steps(steps, counts) -> None:
    assert [latent_step_count(k, steps) for k in (0, 1, 5, 20)] == counts


@pytest.mark.parametrize(("drop_last_step", "counts"), [(True, [7, 6, 6]), (False, [7, 6, 5])])
def test_all_steps_count_and_none_counts_as_one_where_the_last_is_removed(
    tokenizer, drop_last_step, counts
) -> None:
    by_one = LatentSteps(factor=1, bias=5, min=None, max=10)
    for length, count in zip((2, 1, 0), counts, strict=True):
        row = Row("train-1", "How?", ROW.steps[:length], "2")
        example = encode_latent(row, tokenizer, n=0, steps=by_one, drop_last_step=drop_last_step)
        assert example.student.continue_map.sum() == count
        assert bool(example.teacher.reasoning_length) == (length > drop_last_step)


def test_the_limit_of_512_tokens_is_508_on_both_sequences(tokenizer) -> None:
    plain, latent = encode_plain(ROW, tokenizer), encode_latent(ROW, tokenizer, n=30)
    assert len(latent.teacher) != len(latent.student)
    for example, length in (
        (plain, len(plain)),
        (latent, max(len(latent.teacher), len(latent.student))),
    ):
        assert within_limit(example, length + 4)
        assert not within_limit(example, length + 3)
        assert within_limit(example, None)


def test_a_limit_that_leaves_no_row_is_refused_with_its_key(tokenizer) -> None:
    rows = [encode_plain(ROW, tokenizer), encode_plain(replace(ROW, question="?"), tokenizer)]
    assert short_enough(rows, len(rows[1]) + 4) == rows[1:]
    with pytest.raises(DataError, match=r"all 2 rows are longer than data\.max_tokens: 9 allows"):
        short_enough(rows, 9)


def test_prompts_of_each_kind(tokenizer) -> None:
    def prompt(**options) -> str:
        return tokenizer.decode(prompt_of(ROW, tokenizer, prefix="Q: ", **options))

    assert prompt(latent=False) == "<|begin|>Q: How?"
    assert prompt(latent=True) == "<|begin|>Q: How?<START>"
    assert prompt(latent=True, forced_steps=2) == (
        "<|begin|>Q: How?<START><|CONTINUE|><|CONTINUE|><|STOP|> The answer is:"
    )
    assert prompt(latent=True, forced_steps=0) == ("<|begin|>Q: How?<START><|STOP|> The answer is:")
    assert prompt(latent=False, forced_steps=0) == "<|begin|>Q: How? The answer is:"
    with pytest.raises(DataError, match="forced_steps is 2"):
        prompt(latent=False, forced_steps=2)


def test_a_forced_prompt_is_the_beginning_of_the_training_text(tokenizer) -> None:
    student = encode_latent(ROW, tokenizer, n=4).student
    prompt = prompt_of(ROW, tokenizer, prefix="Question: ", latent=True, forced_steps=4)
    assert student.input_ids[: len(prompt)].tolist() == prompt
    assert student.target_position == len(prompt)


def test_eos_that_also_pads_counts_in_a_text_and_is_learned() -> None:
    """Masks and labels follow lengths, not ids: EOS is read and learned, padding is neither."""
    tokenizer = build()
    eos = tokenizer.eos_token_id
    row = Row("train-2", "Is <|end|> first?", ("<|end|>",), "1")
    examples = [encode_plain(row, tokenizer), encode_plain(ROW, tokenizer)]
    batch = collate_plain(examples, eos)
    for ids, mask, labels, example in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], examples, strict=True
    ):
        own = len(example)
        assert ids[-own:].tolist() == example.input_ids.tolist()
        assert mask.tolist() == [0] * (len(mask) - own) + [1] * own
        assert labels[-own:].tolist() == example.labels.tolist()
        assert labels[-1] == eos
    assert (examples[0].labels == eos).sum() == 2


def test_rows_together_give_what_they_give_one_by_one(tokenizer, monkeypatch) -> None:
    rows = [Row(f"train-{i}", f"How {i}?", ("<<1+1=2>>",) * i, str(i)) for i in range(7)]
    monkeypatch.setattr("latent_reasoning.data.context.ROWS_PER_CALL", 3)
    together = encode_plain_rows(
        rows, tokenizer, prefix="Question: ", reasonings=[reasoning_text(row) for row in rows]
    )
    for row, example in zip(rows, together, strict=True):
        alone = encode_plain(row, tokenizer)
        assert example.input_ids.tolist() == alone.input_ids.tolist()
        assert example.target_position == alone.target_position


def test_a_tokenizer_without_the_special_tokens_is_refused(build_tokenizer) -> None:
    tokenizer = build_tokenizer(latent=False)
    lacks = r"lacks the special tokens <START>, <END>, <\|CONTINUE\|>, <\|STOP\|>"
    with pytest.raises(DataError, match=lacks):
        special_token_ids(tokenizer)
    with pytest.raises(DataError, match=lacks):
        prompt_of(ROW, tokenizer, latent=True)


TRAP = Row("train-5", "Is <START> or <|end|> first?", ("<|STOP|>",), "1")


@pytest.mark.parametrize("latent", [True, False])
def test_special_token_text_is_refused_with_row_and_text(build_tokenizer, latent) -> None:
    """The latent tokens' text is special for every tokenizer."""
    reason = r"row train-5: its text holds '<START>'.*special_token_text"
    with pytest.raises(DataError, match=reason):
        apply_special_token_policy([ROW, TRAP], build_tokenizer(latent=latent), "error")


def test_special_token_text_is_skipped_and_counted_or_kept_as_the_token(tokenizer) -> None:
    assert apply_special_token_policy([ROW, TRAP], tokenizer, "skip") == ([ROW], 1)
    assert apply_special_token_policy([TRAP], tokenizer, "keep") == ([TRAP], 0)
    assert special_token_ids(tokenizer).start in encode_plain(TRAP, tokenizer).input_ids


def test_escaped_special_token_text_is_read_as_text(tokenizer) -> None:
    (escaped,), skipped = apply_special_token_policy([TRAP], tokenizer, "escape")
    assert skipped == 0
    assert escaped.question == "Is < START> or < |end|> first?"
    assert escaped.steps == ("< |STOP|>",)
    example = encode_plain(escaped, tokenizer)
    assert special_token_ids(tokenizer).start not in example.input_ids
    assert example.input_ids.tolist().count(tokenizer.eos_token_id) == 1
