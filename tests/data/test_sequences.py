"""Sequences, piece by piece: ids, labels, maps, limits and special-token text."""

from __future__ import annotations

import copy
from itertools import chain

import pytest

from latent_reasoning.config import LatentSteps
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import (
    LatentExample,
    PlainExample,
    apply_special_token_policy,
    beginning,
    encode_latent_rows,
    encode_plain_rows,
    encode_prompt,
    latent_step_count,
    special_token_ids,
    within_limit,
)

ROW = Row("train-0", "How?", ("<<1+1=2>>", "<<2+3=5>>"), "5")
PLAIN = {"form": "cot", "prefix": "Question: "}
LATENT = {
    "prefix": "Question: ",
    "natural_language": False,
    "drop_last_step": True,
    "shift_target": True,
    "mask_latent_labels": False,
    "learn_start": True,
}


def encode_plain(row: Row, tokenizer, *, reasoning: str | None = None, **options) -> PlainExample:
    reasonings = None if reasoning is None else [reasoning]
    (example,) = encode_plain_rows([row], tokenizer, reasonings=reasonings, **options)
    return example


def encode_latent(row: Row, tokenizer, *, n: int, **options) -> LatentExample:
    steps = LatentSteps(factor=0, bias=n, min=None, max=None)
    (example,) = encode_latent_rows([row], tokenizer, steps=steps, **options)
    return example


def text_where(tokenizer, example: PlainExample, positions) -> str:
    return tokenizer.decode(example.input_ids[positions])


def learned(example: PlainExample) -> list[int]:
    return [int(label) for label in example.labels if label != -100]


def test_a_cot_example_is_bos_question_steps_answer_eos(tokenizer) -> None:
    example = encode_plain(ROW, tokenizer, **PLAIN)
    assert tokenizer.decode(example.input_ids) == (
        "<|begin|>Question: How?<<1+1=2>><<2+3=5>> The answer is: 5<|end|>"
    )
    assert text_where(tokenizer, example, example.reasoning_map) == "<<1+1=2>><<2+3=5>>"
    assert tokenizer.decode(learned(example)) == "<<1+1=2>><<2+3=5>> The answer is: 5<|end|>"
    assert len(example.labels) == len(example.input_ids) == len(example)


@pytest.mark.parametrize(
    ("options", "reasoning"),
    [
        ({"form": "no_cot"}, ""),
        ({"drop_last_step": True}, "<<1+1=2>>"),
        ({"natural_language": True}, " <<1+1=2>> <<2+3=5>>"),
        ({"natural_language": True, "drop_last_step": True}, " <<1+1=2>>"),
        ({"reasoning": " Results: 2 5"}, " Results: 2 5"),
    ],
)
def test_the_reasoning_text_of_each_form(tokenizer, options, reasoning) -> None:
    example = encode_plain(ROW, tokenizer, **{**PLAIN, **options})
    assert text_where(tokenizer, example, example.reasoning_map) == reasoning
    assert tokenizer.decode(learned(example)) == f"{reasoning} The answer is: 5<|end|>"


def test_the_target_token_is_the_colon_or_the_one_after_it(tokenizer) -> None:
    colon = encode_plain(ROW, tokenizer, **PLAIN)
    after = encode_plain(ROW, tokenizer, **PLAIN, shift_target=True)
    assert text_where(tokenizer, colon, colon.target_token_map) == ":"
    assert text_where(tokenizer, after, after.target_token_map) == " "
    assert after.target_position == colon.target_position + 1


def test_no_token_crosses_the_border_of_two_pieces(build_tokenizer) -> None:
    """Merges that would join question and step, `is` and `:`, `:` and the answer's space."""
    merges = [("?", "<"), ("s", ":"), (":", "Ġ"), ("Ġ", "5"), ("<", "<")]
    tokenizer = build_tokenizer(merges)
    example = encode_plain(ROW, tokenizer, **PLAIN, shift_target=True)
    assert tokenizer.convert_ids_to_tokens(example.input_ids.tolist())[-4:] == [
        *("s", ":", "Ġ5", "<|end|>")
    ]
    assert text_where(tokenizer, example, example.target_token_map) == " 5"
    assert text_where(tokenizer, example, example.reasoning_map).startswith("<<1")


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("form", ["cot", "no_cot"])
@pytest.mark.parametrize("shift_target", [True, False])
def test_pieces_are_those_of_the_public_code(build_tokenizer, adds_bos, form, shift_target) -> None:
    """The oracle: the public code tokenises one text with separators, and removes them after."""
    tokenizer = build_tokenizer([("s", ":"), (":", "Ġ"), (">", "Ġ"), ("?", "<")], adds_bos=adds_bos)
    reasoning = "".join(ROW.steps or ()) if form == "cot" else ""
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

    example = encode_plain(
        ROW, tokenizer, form=form, prefix="Question: ", shift_target=shift_target
    )
    assert example.input_ids.tolist() == list(chain(*segments))
    assert example.reasoning_map.astype(int).tolist() == flags
    assert example.target_token_map.nonzero()[0].tolist() == [target]
    assert example.labels.tolist() == [-100] * len(first) + list(chain(*segments[1:]))


def test_bos_stands_only_where_the_tokenizer_puts_it(build_tokenizer) -> None:
    without = build_tokenizer(adds_bos=False)
    assert beginning(build_tokenizer()) == [0]
    assert beginning(without) == []
    example = encode_plain(ROW, without, **PLAIN)
    assert without.decode(example.input_ids).startswith("Question: How?")
    assert encode_prompt(ROW, without, prefix="", latent=False) == without("How?")["input_ids"]


def test_the_student_thinks_where_the_teacher_reads_steps(tokenizer) -> None:
    special = special_token_ids(tokenizer)
    example = encode_latent(ROW, tokenizer, n=3, **LATENT)
    latent = [special.start, *[special.continue_] * 3, special.stop]
    student = example.student
    assert student.input_ids[student.reasoning_map].tolist() == latent
    assert student.continue_map.sum() == 3
    assert set(student.input_ids[student.continue_map]) == {special.continue_}
    assert tokenizer.decode(learned(example.teacher)) == "<<1+1=2>> The answer is: 5<|end|>"
    assert tokenizer.decode(student.input_ids) == (
        "<|begin|>Question: How?<START>" + "<|CONTINUE|>" * 3 + "<|STOP|> The answer is: 5<|end|>"
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
    example = encode_latent(ROW, tokenizer, n=1, **{**LATENT, **options})
    assert tokenizer.decode(learned(example.student)) == first_learned


def test_zero_latent_steps_leave_start_and_stop(tokenizer) -> None:
    student = encode_latent(ROW, tokenizer, n=0, **LATENT).student
    assert (student.reasoning_length, student.continue_map.sum()) == (2, 0)


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


def test_all_steps_count_and_none_counts_as_one_where_the_last_is_removed(tokenizer) -> None:
    by_one = LatentSteps(factor=1, bias=5, min=None, max=10)
    rows = [ROW, Row("train-1", "How?", ("<<1+1=2>>",), "2"), Row("train-2", "How?", (), "9")]

    def counts(drop_last_step: bool) -> list[int]:
        options = {**LATENT, "drop_last_step": drop_last_step}
        examples = encode_latent_rows(rows, tokenizer, steps=by_one, **options)
        return [int(example.student.continue_map.sum()) for example in examples]

    assert counts(True) == [7, 6, 6]
    assert counts(False) == [7, 6, 5]


def test_a_one_step_teacher_without_its_last_step_has_no_reasoning(tokenizer) -> None:
    row = Row("train-1", "How?", ("<<1+1=2>>",), "2")
    assert encode_latent(row, tokenizer, n=6, **LATENT).teacher.reasoning_length == 0


def test_the_limit_of_512_tokens_is_508_on_both_sequences(tokenizer) -> None:
    example = encode_plain(ROW, tokenizer, **PLAIN)
    assert within_limit(example, len(example) + 4)
    assert not within_limit(example, len(example) + 3)
    assert within_limit(example, None)
    latent = encode_latent(ROW, tokenizer, n=30, **LATENT)
    longest = max(len(latent.teacher), len(latent.student))
    assert len(latent.teacher) != len(latent.student)
    assert within_limit(latent, longest + 4)
    assert not within_limit(latent, longest + 3)


def test_prompts_of_each_kind(tokenizer) -> None:
    def prompt(**options) -> str:
        return tokenizer.decode(encode_prompt(ROW, tokenizer, prefix="Q: ", **options))

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
    student = encode_latent(ROW, tokenizer, n=4, **LATENT).student
    prompt = encode_prompt(ROW, tokenizer, prefix="Question: ", latent=True, forced_steps=4)
    assert student.input_ids[: len(prompt)].tolist() == prompt
    assert student.target_position == len(prompt)


def test_rows_together_give_what_they_give_one_by_one(tokenizer, monkeypatch) -> None:
    rows = [Row(f"train-{i}", f"How {i}?", ("<<1+1=2>>",) * i, str(i)) for i in range(7)]
    monkeypatch.setattr("latent_reasoning.data.sequences.ROWS_PER_CALL", 3)
    together = encode_plain_rows(rows, tokenizer, **PLAIN)
    for row, example in zip(rows, together, strict=True):
        alone = encode_plain(row, tokenizer, **PLAIN)
        assert example.input_ids.tolist() == alone.input_ids.tolist()
        assert example.target_position == alone.target_position


def test_a_tokenizer_without_the_special_tokens_is_refused(build_tokenizer) -> None:
    tokenizer = build_tokenizer(latent=False)
    lacks = r"lacks the special tokens <START>, <END>, <\|CONTINUE\|>, <\|STOP\|>"
    with pytest.raises(DataError, match=lacks):
        special_token_ids(tokenizer)
    with pytest.raises(DataError, match=lacks):
        encode_prompt(ROW, tokenizer, prefix="", latent=True)


def test_a_row_of_unknown_steps_serves_no_cot_only(tokenizer) -> None:
    row = Row("svamp-4", "How?", None, "5")
    assert encode_plain(row, tokenizer, form="no_cot", prefix="").reasoning_length == 0
    with pytest.raises(DataError, match="svamp-4 has no steps"):
        encode_plain(row, tokenizer, form="cot", prefix="")


TRAP = Row("train-5", "Is <START> or <|end|> first?", ("<|STOP|>",), "1")


def test_special_token_text_is_refused_with_row_and_text(tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"row train-5: its text holds '<START>'.*special_token_text"
    ):
        apply_special_token_policy([ROW, TRAP], tokenizer, "error")


def test_special_token_text_is_skipped_and_counted(tokenizer) -> None:
    assert apply_special_token_policy([ROW, TRAP], tokenizer, "skip") == ([ROW], 1)


def test_escaped_special_token_text_is_read_as_text(tokenizer) -> None:
    (escaped,), skipped = apply_special_token_policy([TRAP], tokenizer, "escape")
    assert skipped == 0
    assert escaped.question == "Is < START> or < |end|> first?"
    assert escaped.steps == ("< |STOP|>",)
    example = encode_plain(escaped, tokenizer, **PLAIN)
    assert special_token_ids(tokenizer).start not in example.input_ids
    assert example.input_ids.tolist().count(tokenizer.eos_token_id) == 1


def test_kept_special_token_text_is_read_as_the_token(tokenizer) -> None:
    rows, skipped = apply_special_token_policy([TRAP], tokenizer, "keep")
    assert (rows, skipped) == ([TRAP], 0)
    assert special_token_ids(tokenizer).start in encode_plain(TRAP, tokenizer, **PLAIN).input_ids


def test_the_latent_tokens_text_is_special_for_every_tokenizer(build_tokenizer) -> None:
    with pytest.raises(DataError, match="<START>"):
        apply_special_token_policy([TRAP], build_tokenizer(latent=False), "error")


def test_an_early_readout_answers_early_but_is_taught_to_go_on(tokenizer) -> None:
    steps = LatentSteps(factor=0, bias=3, min=None, max=None)
    (early,) = encode_latent_rows([ROW], tokenizer, steps=steps, readout=lambda row, n: 1, **LATENT)
    special = special_token_ids(tokenizer)
    start = early.student.question_length
    run = [special.start, special.continue_, special.stop]
    assert early.student.input_ids[start : start + 3].tolist() == run
    assert early.student.labels[start : start + 3].tolist() == [
        special.start,
        special.continue_,
        special.continue_,
    ]
    (whole,) = encode_latent_rows([ROW], tokenizer, steps=steps, readout=lambda row, n: n, **LATENT)
    assert (
        whole.student.labels == encode_latent(ROW, tokenizer, n=3, **LATENT).student.labels
    ).all()
