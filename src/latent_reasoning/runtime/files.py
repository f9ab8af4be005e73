"""Files that are either whole or not there: atomic writes, digests, JSON lines, errors of the disk.

Libraries report a disk that is full, over a quota, read-only or not ours in their own ways:
safetensors and tokenizers raise errors that are no `OSError` and give the system's error number
only in their text. `disk_error` recognises them; `explain` says what is wrong and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file under its final name only when it is complete (write, fsync, rename)."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it takes the name at the end.

    An exception leaves `path` as it was and removes the temporary file. The temporary name keeps
    the suffix, for libraries that choose a format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        with _disk_errors_named(path):
            yield temporary
            temporary.chmod(0o644)
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; it replaces `path` at the end, or is removed.

    What a killed process left is removed too: a folder has one writer at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _disk_errors_named(path):
            yield temporary
            temporary.chmod(0o755)
            for entry in (*temporary.rglob("*"), temporary):
                _sync(entry)
            _replace_folder(path, temporary)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    """Turn errors of a disk that takes no more data into an `OSError` with the final path."""
    try:
        yield
    except Exception as error:
        known = disk_error(error, path)
        if known is None:
            raise
        raise known from error


def _replace_folder(path: Path, new: Path) -> None:
    """Rename `new` to `path`; an old folder is moved away first, so that it is never half there."""
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)
    else:
        new.rename(path)


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON atomically; NaN and infinities are refused."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write the digests of a folder's files beside them, in the form of `sha256sum`."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != SUMS)
    lines = [f"{sha256_of(file)}  {file.name}\n" for file in files]
    write_text_atomically(folder / SUMS, "".join(lines))


def changed_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Files that changed since `write_sums`; none if the folder has no digests.

    Only files whose names match `pattern` are read.
    """
    if not (folder / SUMS).is_file():
        return []
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    listed = [(folder / line[66:], line[:64]) for line in lines if fnmatch(line[66:], pattern)]
    return [f for f, digest in listed if not f.is_file() or sha256_of(f) != digest]


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk: a rename alone does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without locks, as some network file systems are."""


def try_lock(path: Path, owner: str) -> int | None:
    """Lock a file while this process lives and write `owner` to it; None if another process has it.

    The lock belongs to the process, which may take it again. The kernel releases it when the
    process ends, however it ends, or closes any descriptor of the file. Returns the descriptor;
    closing it ends the lock sooner. On a file system without locks the result is never None.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                return None
            if error.errno not in NO_LOCKS:
                raise
        os.ftruncate(descriptor, 0)
        os.write(descriptor, owner.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return descriptor


# -------------------------------------------------------------------------- errors in words


PROBE_BYTES = 1024**2
"""Written as a probe: with less room, the first checkpoint would already fill the disk."""

ELSEWHERE = "set LATENT_REASONING_RESULTS to a folder on another disk"
MAKE_ROOM = f"free some space or {ELSEWHERE}, and run again: nothing that is finished is lost"
MAKE_WRITABLE = f"make it writable or {ELSEWHERE}, and run again"
REMEDIES = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EROFS: MAKE_WRITABLE,
    errno.EACCES: MAKE_WRITABLE,
    errno.EPERM: MAKE_WRITABLE,
}


def explain(error: OSError) -> str:
    """What failed, where and, for a disk that takes no more data, what to do."""
    where = f"{error.filename}: " if error.filename else ""
    what = where + (error.strerror or str(error))
    return f"{what}; {REMEDIES[error.errno]}" if error.errno in REMEDIES else what


def first_line(error: BaseException | str) -> str:
    """The first line of a message, at most 300 characters of it; an error's name if it is empty."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def disk_error(error: Exception, path: Path) -> OSError | None:
    """The disk's error behind `error`, raised while `path` was written; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else None
    if number not in REMEDIES:
        return None
    named = getattr(error, "filename", None)
    return OSError(number, os.strerror(number), str(named or path))


def check_writable(folder: Path) -> None:
    """Write and remove a small file in `folder`; raises an `OSError` with its name on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=".probe.") as stream:
            stream.write(bytes(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
