"""Where rows come from: made here (`generated`), a folder (`local`) or the hub (`hub`).

Every source gives records; `read_records` checks each and makes it a `Row` with the id
`{split}-{line from 0}`. A bad record stops the stage or is counted, as `data.on_bad_row` says;
answers that are no plain numbers are counted and shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from latent_reasoning.config import Data, NumberRule, expand_path
from latent_reasoning.data.answers import is_plain_number, parse_number
from latent_reasoning.data.dial.problems import generate_splits
from latent_reasoning.data.rows import (
    DataError,
    Row,
    json_line_records,
    json_records,
    parse_row,
)

SPLITS = ("train", "validation", "test")
LOGGED_BAD_ROWS = 5
"""Bad rows named in the log when they are skipped; all are counted."""

RECORDS_PER_READ = 4096

Log = Callable[[str], None]


class Record(NamedTuple):
    """One raw row: its line (from 0), where it stands, its content or what is wrong with it."""

    line: int
    where: str
    content: Any


@dataclass(frozen=True)
class RawSplit:
    """The rows of one split, before any filter.

    `bad_rows` were skipped; of `rows`, `not_plain` have an answer that is no plain number.
    """

    rows: list[Row]
    bad_rows: int
    not_plain: int


def read_splits(data: Data, log: Log) -> dict[str, RawSplit]:
    """Train, validation and test of the configured source.

    Raises:
        DataError: a source that cannot be read, a malformed row, a split without rows, or with
            another number of rows than expected.
        ConfigError: a path with a variable that is not set.
    """
    if data.source == "generated":
        sources = _generated(data)
    elif data.source == "local":
        sources = {split: _local(data, split) for split in SPLITS}
    else:
        sources = _hub(data)
    limits = data.limits.model_dump()
    splits = {
        split: read_split(split, islice(records, limits[split]), data, log)
        for split, records in sources.items()
    }
    for split, raw in splits.items():
        expected = getattr(data.expected_rows, split)
        found = len(raw.rows) + raw.bad_rows
        if expected not in (None, found) and limits[split] is None:
            raise DataError(
                f"data.expected_rows.{split}: the source has {found:,} rows instead of "
                f"{expected:,}; it is another release, or a part of the data: pin data.revision, "
                "complete data.path, or change the key"
            )
    return splits


def read_test_set(data: Data, name: str, log: Log) -> RawSplit:
    """One of `data.extra_tests`.

    Raises:
        DataError: a file that cannot be read, a malformed row, or no rows.
        ConfigError: a path with a variable that is not set.
    """
    file = _existing(expand_path(data.extra_tests[name]), f"data.extra_tests.{name}")
    return read_split(name, file_records(file), data, log)


def read_split(split: str, records: Iterator[Record], data: Data, log: Log) -> RawSplit:
    """Check the records of one split.

    Raises:
        DataError: a bad row if `on_bad_row` is `error`, or no row at all.
    """
    return read_records(
        split,
        records,
        on_bad_row=data.on_bad_row,
        rule=data.number_rule,
        log=log,
        hint="data.on_bad_row: skip",
        filtered=split == "train",
    )


def read_records(
    name: str,
    records: Iterable[Record],
    *,
    on_bad_row: Literal["error", "skip"],
    rule: NumberRule,
    log: Log,
    hint: str,
    filtered: bool = False,
) -> RawSplit:
    """The rows of some records, with ids `{name}-{line from 0}`.

    `hint` names the setting that skips bad rows. Where rows are `filtered` later, an answer that
    holds no number is left to the filter; elsewhere it makes a bad row.

    Raises:
        DataError: a bad row if `on_bad_row` is `error`, or no row at all.
    """
    rows: list[Row] = []
    bad_rows, not_plain, example = 0, 0, ""
    for record in records:
        try:
            row = _checked(name, record, rule, filtered)
        except DataError as error:
            if on_bad_row == "error":
                raise DataError(f"{error}; {hint} leaves such rows out") from error
            bad_rows += 1
            if bad_rows <= LOGGED_BAD_ROWS:
                log(f"skipped: {error}")
            continue
        rows.append(row)
        if not is_plain_number(row.answer, rule):
            not_plain += 1
            example = example or _reading(row, record.where, rule, filtered)
    if bad_rows:
        log(f"{name}: {bad_rows} bad rows skipped, {len(rows)} read")
    if not rows:
        raise DataError(f"the split {name} has no rows ({bad_rows} bad ones skipped)")
    if not_plain:
        log(f"{name}: {not_plain:,} of {len(rows):,} answers are not plain numbers; {example}")
    return RawSplit(rows, bad_rows, not_plain)


def _checked(name: str, record: Record, rule: NumberRule, filtered: bool) -> Row:
    if isinstance(record.content, DataError):
        raise record.content
    row = parse_row(record.content, f"{name}-{record.line}", record.where)
    # The public filter keeps `nan`, which equals no number.
    kept = not filtered or is_plain_number(row.answer, rule)
    if kept and parse_number(row.answer, rule) is None:
        raise DataError(
            f"{record.where}: the answer {row.answer!r:.80} holds no number to compare with: it is "
            "neither a plain number nor a text with a single one"
        )
    return row


def _reading(row: Row, where: str, rule: NumberRule, filtered: bool) -> str:
    """What becomes of a row whose answer is no plain number."""
    becomes = "dropped" if filtered else f"read as {parse_number(row.answer, rule):.15g}"
    return f"{where}: {row.answer!r:.80} {becomes}"


def file_records(path: Path) -> Iterator[Record]:
    """Records of one file of JSON lines, a JSON list or a parquet file (by its suffix).

    A file without suffix, such as a pipe, holds JSON lines.

    Raises:
        DataError: a file that cannot be read, or of another kind.
    """
    if path.suffix in (".jsonl", ".ndjson", ""):
        for line, content in json_line_records(path):
            yield Record(line, f"{path}, line {line + 1}", content)
    elif path.suffix in (".json", ".parquet"):
        read = json_records(path) if path.suffix == ".json" else enumerate(_parquet_records(path))
        for line, content in read:
            yield Record(line, f"{path}, row {line + 1}", content)
    else:
        raise DataError(f"{path}: rows are read from .jsonl, .json and .parquet files")


def _generated(data: Data) -> dict[str, Iterator[Record]]:
    settings = data.generated.model_dump()
    sizes = [settings.pop(split) for split in SPLITS]
    try:
        splits = generate_splits(*sizes, **settings)
    except ValueError as error:
        raise DataError(f"data.generated: {error}") from error
    return {
        split: (
            Record(line, f"generated {split} row {line + 1}", row)
            for line, row in enumerate(splits[split])
        )
        for split in SPLITS
    }


def _local(data: Data, split: str) -> Iterator[Record]:
    folder = _existing(expand_path(str(data.path)), "data.path")
    files = [folder / f"{split}{suffix}" for suffix in (".jsonl", ".json", ".parquet")]
    found = [file for file in files if file.is_file()]
    # The hub's own layout: `data/train-00000-of-00002.parquet`.
    shards = sorted(folder.glob(f"{split}-*-of-*.parquet"), key=_place)
    if not found and not shards:
        raise DataError(f"data.path: {folder} has no {split}.jsonl, .json or .parquet")
    if len(found) + bool(shards) > 1:
        names = ", ".join(file.name for file in (*found, *shards))
        raise DataError(f"data.path: {folder} has {split} more than once: {names}")
    if [_place(shard) for shard in shards] != [[i, len(shards)] for i in range(len(shards))]:
        names = ", ".join(shard.name for shard in shards)
        raise DataError(
            f"data.path: {folder} has only parts of {split}, or parts of two copies: {names}"
        )
    return _renumbered(found or shards)


def _place(shard: Path) -> list[int]:
    """Which part of a split a file is (from 0), and of how many."""
    match = re.search(r"-(\d+)-of-(\d+)", shard.name)
    return [int(number) for number in match.groups()] if match else []


def _renumbered(files: list[Path]) -> Iterator[Record]:
    """Records of files one after the other; a later file continues the line numbers."""
    offset = 0
    for file in files:
        last = -1
        for record in file_records(file):
            last = record.line
            yield record._replace(line=offset + record.line)
        offset += last + 1


def _existing(path: Path, key: str) -> Path:
    if not path.exists():
        raise DataError(f"{key}: {path} does not exist")
    return path


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: a column stands twice among {', '.join(names)}")
            for batch in file.iter_batches(batch_size=RECORDS_PER_READ):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _hub(data: Data) -> dict[str, Iterator[Record]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data.source: hub needs the package datasets; or use data.source: local"
        ) from error
    wanted = [part for part in (data.hub_id, data.hub_config) if part is not None]
    name = f"{'/'.join(wanted)!r} (revision {data.revision or 'not pinned'})"
    try:
        loaded = datasets.load_dataset(*wanted, revision=data.revision)
    except Exception as error:  # the client raises errors of many kinds, by version and cause
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data.hub_id: {name} could not be loaded from the hub: {reason}. With a local copy, "
            "set data.source: local and data.path to its folder (train, validation and test as "
            ".jsonl or .parquet)"
        ) from error
    missing = [split for split in SPLITS if split not in loaded]
    if missing:
        raise DataError(f"data.hub_id: {name} has no split {', '.join(missing)}")
    return {split: _hub_records(data.hub_id, split, loaded[split]) for split in SPLITS}


def _hub_records(hub_id: str | None, split: str, records: Any) -> Iterator[Record]:
    for line, content in enumerate(records):
        yield Record(line, f"{hub_id}, {split}, row {line + 1}", content)
