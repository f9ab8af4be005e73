"""Rows: one question with its steps and its answer, read from JSON and checked one by one.

GSM8K's own rows, whose answer is a solution that ends in `#### 72`, become rows of GSM8K-Aug form:
the calculator annotations (`<<9-4=5>>`) are the steps, what stands after `####` is the answer.

A malformed row is a `DataError` that names the file, the line (from 1, as editors count) and the
reason. A row's id is `{split}-{line from 0}` and stays with it through every later file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from latent_reasoning.config import UserError
from latent_reasoning.runtime.files import sha256_of

ANSWER_MARK = "####"
"""Stands before the answer in GSM8K's own rows."""
MAX_EXPONENT = 9999
"""Numbers beyond 10 to this power are refused: no text spells them out."""

_ANNOTATION = re.compile(r"<<[^<>]*>>")


class DataError(UserError, ValueError):
    """Data that cannot be used; the message says which file and line (or row), and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example: `steps` is None if the source has none (then only the answer is known)."""

    id: str
    question: str
    steps: tuple[str, ...] | None
    answer: str


def parse_row(record: Any, row_id: str, where: str) -> Row:
    """Check one decoded record and make it a `Row`.

    `where` names the file and line for the message. Answers may be numbers, which are written
    without exponent; other columns are ignored. Where a row without steps has GSM8K's solution for
    its answer, the solution's annotations are its steps. An empty answer is text like any other:
    the training filter drops it.

    Raises:
        DataError: no mapping, no question, no answer, or a column of the wrong type.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: a row is a mapping, not {_type_name(record)}")
    question = _text(record, "question", where)
    if not question.strip():
        raise DataError(f"{where}: the question is empty")
    answer = record.get("answer")
    if isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        record = {**record, "answer": _spelled_out(answer, where)}
    solution, mark, answer = _text(record, "answer", where).rpartition(ANSWER_MARK)
    steps = record.get("steps")
    if mark:
        answer = answer.strip()
        steps = _ANNOTATION.findall(solution) if steps is None else steps
    if steps is not None:
        if not isinstance(steps, list | tuple) or not all(isinstance(s, str) for s in steps):
            other = " of other things" if isinstance(steps, list | tuple) else ""
            raise DataError(
                f"{where}: steps is a list of texts (or null), not {_type_name(steps)}{other}"
            )
        for step in steps:
            _check_unicode(step, "steps", where)
        steps = tuple(steps)
    return Row(row_id, question, steps, answer)


def json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The number (from 0) and decoded record of each row of a .json file: a list, or JSON lines.

    Raises:
        DataError: the file does not exist, cannot be read, or is a list that cannot be decoded.
    """
    content = _read_bytes(path)
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from json_line_records(path)
        return
    records = _decoded(content, f"{path}")
    if isinstance(records, DataError):
        raise records
    yield from enumerate(records)


def json_line_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The line number (from 0) and decoded record of each line that is not blank.

    A line that cannot be decoded yields its `DataError` in the record's place, so that the caller
    can stop or count it.

    Raises:
        DataError: the file does not exist or cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    yield number, _decoded(line, f"{path}, line {number + 1}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decoded(text: bytes, where: str) -> Any:
    """The content of some JSON, or the `DataError` that says why it has none."""
    try:
        # Decimals keep numbers as they are written, beyond a float's range and precision.
        return json.loads(text.decode("utf-8-sig"), parse_float=Decimal, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: {error.reason}"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        problem = f"not JSON: {error.msg} ({line}column {error.colno})"
    except ValueError as error:  # a number of thousands of digits, a repeated key
        problem = f"not readable: {error}"
    except ArithmeticError:
        problem = "not readable: a number with an exponent beyond all bounds"
    except RecursionError:
        problem = "nested too deeply"
    return DataError(f"{where}: {problem}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of some JSON, whose reader would take the last one of a key's values."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return mapping


def read_rows(path: Path) -> list[Row]:
    """Rows of a prepared file (`results/{experiment}/data/{split}.jsonl`), which carry their ids.

    Raises:
        DataError: a missing or changed file, a malformed row, or no rows.
    """
    _check_unchanged(path)
    rows = []
    for number, record in json_line_records(path):
        where = f"{path}, line {number + 1}"
        if isinstance(record, DataError):
            raise record
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise DataError(f"{where}: no id: not a file written by prepare_data")
        rows.append(parse_row(record, record["id"], where))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _check_unchanged(path: Path) -> None:
    """Compare a prepared file with the SHA-256 beside it."""
    digest = path.with_suffix(".sha256")
    if not path.is_file() or not digest.is_file():
        return
    if sha256_of(path) != digest.read_text(encoding="utf-8", errors="replace").strip():
        raise DataError(
            f"{path}: not as it was prepared (its SHA-256 is not the one in {digest.name}): "
            "damaged or edited; delete both and run the workflow again"
        )


def row_lines(rows: Iterable[Row]) -> Iterator[str]:
    """The JSON line of each row, as `read_rows` reads it."""
    for row in rows:
        record = {"id": row.id, "question": row.question, "steps": row.steps, "answer": row.answer}
        yield json.dumps(record, ensure_ascii=False) + "\n"


def normalise_question(question: str) -> str:
    """The text by which questions are compared: each run of white space is one space."""
    return " ".join(question.split())


def _spelled_out(number: float | Decimal, where: str) -> str:
    """A number as text without exponent: 2e-05 becomes 0.00002, 3e16 becomes 30000000000000000."""
    exact = Decimal(repr(number) if isinstance(number, float) else number)
    if not exact.is_finite():
        raise DataError(f"{where}: the answer is not a finite number")
    if abs(exact.adjusted()) > MAX_EXPONENT:
        raise DataError(f"{where}: the answer {exact} is too large or too small to spell out")
    return format(exact, "f")


def _text(record: dict[str, Any], column: str, where: str) -> str:
    if column not in record or record[column] is None:
        raise DataError(f"{where}: no {column}")
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is text, not {_type_name(value)}")
    _check_unicode(value, column, where)
    return value


def _check_unicode(text: str, column: str, where: str) -> None:
    """Refuse half of a surrogate pair, which JSON can hold but no file and no tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {column} is not valid Unicode: {error.reason}") from error


def _type_name(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    other = "a number" if isinstance(value, int | float | Decimal) else type(value).__name__
    return names.get(type(value), other)
