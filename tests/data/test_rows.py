"""Rows are checked one by one; errors name file, line and reason."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest

from latent_reasoning.data.rows import (
    DataError,
    Row,
    json_line_records,
    normalise_question,
    parse_row,
    read_rows,
    row_lines,
)
from latent_reasoning.runtime.files import sha256_of


def test_a_row_keeps_its_texts_unchanged() -> None:
    record = {"question": " Two  spaces? ", "steps": ["<<1+1=2>>"], "answer": " 2 ", "extra": 1}
    assert parse_row(record, "train-7", "x") == Row(
        "train-7", " Two  spaces? ", ("<<1+1=2>>",), " 2 "
    )


def test_steps_may_be_unknown_which_is_not_the_same_as_none() -> None:
    def steps(**record) -> tuple[str, ...] | None:
        return parse_row({"question": "q?", "answer": "1", **record}, "x-0", "x").steps

    assert (steps(), steps(steps=None), steps(steps=[])) == (None, None, ())


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (18, "18"),
        (2.5, "2.5"),
        (2e-05, "0.00002"),
        (3e16, "30000000000000000"),
        (Decimal("0.50"), "0.50"),
        (Decimal("-1E+3"), "-1000"),
        (10**30 + 1, "1" + "0" * 29 + "1"),
    ],
)
def test_a_number_as_answer_is_spelled_out(answer: object, text: str) -> None:
    assert parse_row({"question": "q?", "answer": answer}, "x-0", "x").answer == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("0.00002", "0.00002"),
        ("3e16", "30000000000000000"),
        ("1E2", "100"),
        ("1e-400", "0." + "0" * 399 + "1"),
        ("12345678901234567890.123", "12345678901234567890.123"),
    ],
)
def test_a_number_in_json_keeps_every_digit(tmp_path, written: str, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "q?", "answer": {written}}}')
    ((_, record),) = json_line_records(path)
    assert parse_row(record, "x-0", "x").answer == text


def test_gsm8ks_own_rows_take_the_form_of_gsm8k_aug() -> None:
    solution = "It had 9 pens.\n9-4=<<9-4=5>>5 pens, twice <<5*2=10>>10.\n#### 1,010 "
    raw = parse_row({"question": "q?", "answer": solution}, "train-0", "x")
    assert (raw.steps, raw.answer) == (("<<9-4=5>>", "<<5*2=10>>"), "1,010")
    given = parse_row({"question": "q?", "answer": "#### 5", "steps": ["a"]}, "train-0", "x")
    assert (given.steps, given.answer) == (("a",), "5")
    bare = parse_row({"question": "q?", "answer": "Nine #### less 4.\n####5"}, "train-0", "x")
    assert (bare.steps, bare.answer) == ((), "5")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["q"], "a row is a mapping, not a list"),
        ({"answer": "1"}, "no question"),
        ({"question": "q?"}, "no answer"),
        ({"question": "q?", "answer": None}, "no answer"),
        ({"question": " ", "answer": "1"}, "the question is empty"),
        ({"question": 3, "answer": "1"}, "question is text, not a number"),
        ({"question": "q?", "answer": True}, "answer is text, not true/false"),
        ({"question": "q?", "answer": float("nan")}, "the answer is not a finite number"),
        ({"question": "q?", "answer": Decimal("-Infinity")}, "the answer is not a finite number"),
        ({"question": "q?", "answer": Decimal("1e10000")}, "the answer 1E+10000 is too large"),
        ({"question": "q?", "answer": "1", "steps": "<<1=1>>"}, "steps is a list of texts"),
        ({"question": "q?", "answer": "1", "steps": [1]}, "steps is a list of texts"),
        ({"question": "q?", "answer": b"1"}, "answer is text, not bytes"),
        ({"question": "\ud800", "answer": "1"}, "question is not valid Unicode"),
    ],
)
def test_a_malformed_row_is_refused_with_its_place_and_reason(record: object, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"rows.jsonl, line 3: {reason}")):
        parse_row(record, "train-2", "rows.jsonl, line 3")


def test_lines_are_counted_as_they_stand_in_the_file(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    long, deep = b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 10**5
    vast = b'{"a": 1e99999999999999999999}'
    lines = b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n\xff\n%b\n%b\n{"a": 2}\n%b\n{"a": 1, "a": 2}' % (
        long,
        deep,
        vast,
    )
    path.write_bytes(lines)
    expected = {
        0: {"a": 1},
        2: "line 3: not JSON: Expecting value",
        3: "line 4: not UTF-8",
        4: "line 5: not readable",
        5: "line 6: nested too deeply",
        6: {"a": 2},
        7: "line 8: not readable: a number",
        8: "line 9: not readable: the key 'a' stands twice",
    }
    found = dict(json_line_records(path))
    assert list(found) == list(expected)
    for line, content in expected.items():
        if isinstance(content, dict):
            assert found[line] == content
        else:
            assert isinstance(found[line], DataError)
            assert str(found[line]).startswith(f"{path}, {content}")


def test_prepared_rows_come_back_as_they_were(tmp_path) -> None:
    rows = [
        Row("train-3", "Who’s?\nnew line", ("a", "b"), "1,200"),
        Row("test-0", "q?", None, "2"),
        Row("train-3-copy-1", "q?", (), "2"),
    ]
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(row_lines(rows)), encoding="utf-8")
    assert read_rows(path) == rows


def test_a_prepared_file_that_is_missing_empty_or_foreign_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: No such file"):
        read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "foreign.jsonl").write_text('{"question": "q?", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"foreign\.jsonl, line 1: no id"):
        read_rows(tmp_path / "foreign.jsonl")


def test_questions_are_the_same_whatever_their_white_space() -> None:
    assert normalise_question(" How\tmany \n eggs? ") == "How many eggs?"


def test_a_prepared_file_that_changed_since_is_refused_by_name(tmp_path):
    file = tmp_path / "sft.jsonl"
    row = '{"id": "train-0", "question": "1 + 1?", "steps": null, "answer": "2"}\n'
    file.write_text(row, encoding="utf-8")
    file.with_suffix(".sha256").write_text(sha256_of(file) + "\n", encoding="utf-8")
    assert len(read_rows(file)) == 1
    file.write_text(row.replace('"2"', '"3"'), encoding="utf-8")
    with pytest.raises(DataError, match=r"sft\.jsonl: not as it was prepared.*delete both"):
        read_rows(file)
