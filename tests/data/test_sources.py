"""Rows from a folder, the hub and the generator; bad rows are refused or counted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from latent_reasoning.config import ConfigError, Data
from latent_reasoning.data.rows import DataError
from latent_reasoning.data.sources import SPLITS, read_splits, read_test_set

Record = dict[str, Any]


def record(number: int, **changes: Any) -> Record:
    row = {"question": f"{number} plus 1?", "steps": [f"<<{number}+1={number + 1}>>"]}
    return {**row, "answer": str(number + 1), **changes}


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, first in (("train", 0), ("validation", 100), ("test", 200)):
        lines = [json.dumps(record(first + i)) + "\n" for i in range(5)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def local(folder: Path, **options: Any) -> Data:
    return Data.model_validate({"source": "local", "path": str(folder), **options})


def read(data: Data, log: Callable[[str], None] = lambda line: None) -> dict[str, list]:
    return {name: split.rows for name, split in read_splits(data, log).items()}


def test_a_folder_of_json_lines(folder) -> None:
    splits = read(local(folder))
    assert {name: len(rows) for name, rows in splits.items()} == dict.fromkeys(SPLITS, 5)
    row = splits["validation"][3]
    assert (row.id, row.question, row.steps) == ("validation-3", "103 plus 1?", ("<<103+1=104>>",))


def test_another_number_of_rows_than_expected_is_refused(folder) -> None:
    read(local(folder, expected_rows={"train": 5, "test": 5}))
    other = {"expected_rows": {"train": 5, "test": 1319}}
    with pytest.raises(DataError, match=r"expected_rows.test: the source has 5 rows instead of"):
        read(local(folder, **other))
    assert len(read(local(folder, **other, limits={"test": 2}))["test"]) == 2
    with (folder / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write("no row\n")  # one that is skipped counts
    options = {"on_bad_row": "skip", "expected_rows": {"test": 6}}
    assert len(read(local(folder, **options))["test"]) == 5


def test_a_folder_of_parquet_is_the_same(folder, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("parquet")
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").open()]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), other / f"{split}.parquet")
    assert read(local(other)) == read(local(folder))


def test_a_folder_of_json_lists_is_the_same(folder) -> None:
    expected = read(local(folder))
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").open()]
        (folder / f"{split}.jsonl").unlink()
        text = json.dumps(rows, indent=1) if split != "test" else "\n".join(map(json.dumps, rows))
        (folder / f"{split}.json").write_text(text)
    assert read(local(folder)) == expected


def test_a_json_list_that_cannot_be_read_and_a_row_in_it_are_named(folder) -> None:
    (folder / "test.jsonl").unlink()
    file = folder / "test.json"
    file.write_text('[{"question": "q?", "answer": "1"},\n 5]')
    with pytest.raises(DataError, match=r"test\.json, row 2: a row is a mapping, not a number"):
        read(local(folder))
    file.write_text('[{"question": "q?",\n}]')
    with pytest.raises(DataError, match=r"test\.json: not JSON: .* \(line 2, column 1\)"):
        read(local(folder))


def test_decimals_of_parquet_are_numbers(folder) -> None:
    answers = pyarrow.array([Decimal("0.50"), Decimal("12.50")], pyarrow.decimal128(4, 2))
    table = pyarrow.table({"question": ["a?", "b?"], "answer": answers})
    (folder / "test.jsonl").unlink()
    pyarrow.parquet.write_table(table, folder / "test.parquet")
    assert [row.answer for row in read(local(folder))["test"]] == ["0.50", "12.50"]


def test_shards_of_parquet_are_read_in_order_and_numbered_through(folder) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").open()]
    expected = read(local(folder))["train"]
    (folder / "train.jsonl").unlink()
    for shard, part in enumerate((rows[:2], rows[2:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, folder / f"train-0000{shard}-of-00002.parquet")
    assert read(local(folder))["train"] == expected


@pytest.mark.parametrize("shards", [["1-of-00002"], ["0-of-00001", "1-of-00002", "0-of-00002"]])
def test_shards_that_are_not_one_whole_are_refused(folder, shards) -> None:
    (folder / "train.jsonl").unlink()
    for shard in shards:
        file = folder / f"train-0000{shard}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record(1)]), file)
    with pytest.raises(DataError, match="only parts of train, or parts of two copies: train-0"):
        read(local(folder))


def test_paths_may_hold_a_variable(folder, monkeypatch) -> None:
    monkeypatch.setenv("LATENT_REASONING_DATA", str(folder))
    data = local(Path("${LATENT_REASONING_DATA}"))
    assert len(read(data)["train"]) == 5
    monkeypatch.delenv("LATENT_REASONING_DATA")
    with pytest.raises(ConfigError, match="LATENT_REASONING_DATA"):
        read(data)


def test_an_extra_test_set_needs_no_steps(folder) -> None:
    (folder / "svamp.jsonl").write_text('{"question": "q?", "answer": 7}\n')
    data = local(folder, extra_tests={"svamp": f"{folder}/svamp.jsonl"})
    (row,) = read_test_set(data, "svamp", print).rows
    assert (row.id, row.steps, row.answer) == ("svamp-0", None, "7")


def test_limits_take_the_first_rows(folder) -> None:
    splits = read(local(folder, limits={"train": 2, "test": 9}))
    assert [row.id for row in splits["train"]] == ["train-0", "train-1"]
    assert (len(splits["validation"]), len(splits["test"])) == (5, 5)


def test_a_missing_folder_file_or_extra_set_is_named(folder) -> None:
    with pytest.raises(DataError, match=r"data\.path: /no/such does not exist"):
        read(local(Path("/no/such")))
    with pytest.raises(DataError, match=r"data\.extra_tests\.svamp: .*svamp\.jsonl does not exist"):
        read_test_set(local(folder, extra_tests={"svamp": f"{folder}/svamp.jsonl"}), "svamp", print)
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"has no test\.jsonl, \.json or \.parquet"):
        read(local(folder))


def test_a_split_that_stands_twice_is_refused(folder) -> None:
    table = pyarrow.Table.from_pylist([record(1)])
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    with pytest.raises(DataError, match=r"train more than once: train\.jsonl, train\.parquet"):
        read(local(folder))


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_split_is_named(folder, split) -> None:
    (folder / f"{split}.jsonl").write_text("\n")
    with pytest.raises(DataError, match=rf"the split {split} has no rows \(0 bad ones skipped\)"):
        read(local(folder))
    (folder / f"{split}.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=rf"the split {split} has no rows \(1 bad ones skipped\)"):
        read(local(folder, on_bad_row="skip"))


def test_a_truncated_parquet_file_is_named(folder) -> None:
    (folder / "test.jsonl").unlink()
    (folder / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"test\.parquet: not a readable parquet file"):
        read(local(folder))


NO_UTF8 = pyarrow.StringArray.from_buffers(
    1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")
)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"question": ["q?"], "answer": NO_UTF8}, "not a readable parquet file: 'utf-8'"),
        ({"question": ["q?"], "answer": ["1"], "answer ": ["2"]}, "a column stands twice among"),
    ],
)
def test_parquet_that_could_be_misread_is_refused(folder, columns, problem) -> None:
    (folder / "test.jsonl").unlink()
    table = pyarrow.table(columns)
    table = table.rename_columns([name.strip() for name in table.column_names])
    pyarrow.parquet.write_table(table, folder / "test.parquet")
    with pytest.raises(DataError, match=rf"test\.parquet: {problem}"):
        read(local(folder))


BAD_LINES = [
    ("{not json", "not JSON"),
    ('["a list"]', "a row is a mapping"),
    ('{"question": "q?", "steps": []}', "no answer"),
    ('{"steps": [], "answer": "1"}', "no question"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_row_stops_with_file_line_and_reason(folder, line, reason) -> None:
    path = folder / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=re.escape(f"{path}, line 3: {reason}")):
        read(local(folder))


def test_skipped_bad_rows_are_counted_and_the_others_keep_their_lines(folder) -> None:
    path = folder / "train.jsonl"
    lines = path.read_text().splitlines()
    bad = [line for line, _ in BAD_LINES]
    path.write_text("\n".join([lines[0], *bad, *bad, lines[1]]) + "\n")
    log: list[str] = []
    train = read_splits(local(folder, on_bad_row="skip"), log.append)["train"]
    assert [row.id for row in train.rows] == ["train-0", "train-9"]
    assert train.bad_rows == 8
    assert log[0].startswith(f"skipped: {path}, line 2: not JSON")
    assert log[-1] == "train: 8 bad rows skipped, 2 read"
    assert len(log) == 6


@pytest.mark.parametrize(
    ("split", "answer"),
    [
        *[("test", answer) for answer in ("none", "", "3,5", "1.234,50", "1 234", "10^6")],
        *[("validation", answer) for answer in ("infinity", "9 pens less 4 are 5")],
    ],
)
def test_a_label_without_a_single_number_is_refused_at_load(folder, split, answer) -> None:
    path = folder / f"{split}.jsonl"
    path.write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2, answer=answer)) + "\n")
    with pytest.raises(DataError, match=rf"{split}\.jsonl, line 2: the answer .* holds no number"):
        read(local(folder))


def test_the_public_filter_keeps_nan_which_is_no_label(folder) -> None:
    (folder / "train.jsonl").write_text(json.dumps(record(1, answer="nan")) + "\n")
    assert read(local(folder))["train"][0].answer == "nan"  # our filter drops it
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: the answer 'nan' holds no number"):
        read(local(folder, number_rule="public"))


def test_answers_that_are_no_plain_numbers_are_counted_and_shown(folder) -> None:
    for split, answers in (("train", ["1/2", "a half"]), ("test", ["72 dollars", "50%", "-$5"])):
        lines = [json.dumps(record(i, answer=answer)) for i, answer in enumerate(answers)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    log: list[str] = []
    splits = read_splits(local(folder), log.append)
    assert [splits[split].not_plain for split in SPLITS] == [1, 0, 2]
    assert log == [
        f"train: 1 of 2 answers are not plain numbers; {folder}/train.jsonl, line 2: "
        "'a half' dropped",
        f"test: 2 of 3 answers are not plain numbers; {folder}/test.jsonl, line 1: "
        "'72 dollars' read as 72",
    ]
    read_splits(local(folder, number_rule="public"), log.append)
    assert log[3].startswith("test: 3 of 3 answers are not plain numbers")


def test_gsm8ks_own_files_serve_as_train_validation_and_test(folder) -> None:
    expected = read(local(folder))
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").open()]
        raw = [
            {"question": row["question"], "answer": f"{row['steps'][0]}.\n#### {row['answer']}"}
            for row in rows
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, raw)))
    assert read(local(folder)) == expected


def test_a_training_answer_that_is_no_plain_number_is_left_to_the_filter(folder) -> None:
    path = folder / "train.jsonl"
    path.write_text(json.dumps(record(1, answer="")) + "\n" + json.dumps(record(2)) + "\n")
    assert [row.answer for row in read(local(folder))["train"]] == ["", "3"]


def test_generated_rows_are_numbered_and_repeatable() -> None:
    data = Data.model_validate({"generated": {"train": 20, "validation": 5, "test": 6}})
    splits = read(data)
    assert [len(splits[name]) for name in SPLITS] == [20, 5, 6]
    assert splits["test"][5].id == "test-5"
    assert splits == read(data)


def test_a_generator_that_cannot_fill_its_splits_names_its_settings() -> None:
    generated = {"train": 1, "validation": 1, "test": 1, "max_steps": 8, "step_weights": [1] * 8}
    with pytest.raises(DataError, match=r"data\.generated: max_steps is 8"):
        read(Data.model_validate({"generated": generated}))


HUB = {"source": "hub", "hub_id": "someone/rows", "revision": "abc123"}


def fake_hub(monkeypatch, load: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_hub_rows_come_at_the_pinned_revision(monkeypatch) -> None:
    asked = []

    def load(hub_id, revision):
        asked.append((hub_id, revision))
        return {name: [record(i)] for i, name in enumerate(SPLITS)}

    fake_hub(monkeypatch, load)
    splits = read(Data.model_validate(HUB))
    assert asked == [("someone/rows", "abc123")]
    fake_hub(monkeypatch, lambda hub_id, name, revision: asked.append(name) or load(name, ""))
    read(Data.model_validate({**HUB, "hub_config": "main"}))
    assert asked[1] == "main"
    assert [splits[name][0].answer for name in splits] == ["1", "2", "3"]


def test_an_unreachable_hub_id_says_which_and_names_the_local_way(monkeypatch) -> None:
    def load(hub_id, revision):
        raise ConnectionError("Couldn't reach\nthe hub")

    fake_hub(monkeypatch, load)
    message = (
        r"'someone/rows' \(revision abc123\) could not be loaded.*Couldn't reach the hub.*"
        r"data\.source: local and data\.path"
    )
    with pytest.raises(DataError, match=message):
        read(Data.model_validate(HUB))


def test_a_hub_set_without_a_split_is_refused(monkeypatch) -> None:
    fake_hub(monkeypatch, lambda hub_id, revision: {"train": [record(1)]})
    with pytest.raises(DataError, match="has no split validation, test"):
        read(Data.model_validate(HUB))
