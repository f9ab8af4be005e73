"""Files and folders that are whole or not there, and errors of a disk in words."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from latent_reasoning.runtime.files import (
    SUMS,
    atomic_directory,
    atomic_file,
    changed_files,
    check_writable,
    disk_error,
    explain,
    first_line,
    try_lock,
    write_sums,
)


def fill(folder, text: str) -> None:
    with atomic_directory(folder) as temporary:
        (temporary / "a.txt").write_text(text)


def test_a_folder_replaces_the_one_of_its_name_and_leaves_nothing_else(tmp_path):
    fill(tmp_path / "model", "old")
    fill(tmp_path / "model", "new")
    assert (tmp_path / "model" / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_stays_whole_where_writing_fails(tmp_path):
    fill(tmp_path / "model", "old")
    with contextlib.suppress(ValueError), atomic_directory(tmp_path / "model") as temporary:
        (temporary / "a.txt").write_text("ne")
        raise ValueError
    assert (tmp_path / "model" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    (tmp_path / ".model.abc.tmp").mkdir()
    (tmp_path / ".other.abc.tmp").mkdir()
    fill(tmp_path / "model", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.abc.tmp", "model"]


def test_digests_tell_which_files_changed(tmp_path):
    for name in ("a", "b b", "c"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    assert changed_files(tmp_path) == []
    (tmp_path / "a").write_text("A")
    (tmp_path / "b b").unlink()
    assert changed_files(tmp_path) == [tmp_path / "a", tmp_path / "b b"]
    (tmp_path / SUMS).unlink()
    assert changed_files(tmp_path) == []


def test_a_process_takes_its_lock_again_and_any_where_there_are_none(tmp_path, monkeypatch):
    assert try_lock(tmp_path / "lock", "process 7 on a host of a long name") is not None
    assert try_lock(tmp_path / "lock", "process 7") is not None
    assert (tmp_path / "lock").read_text() == "process 7"

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert try_lock(tmp_path / "network", "process 7") is not None


# ----------------------------------------------------------------------------- errors in words


def test_the_first_line_of_an_error_is_its_name_where_it_says_nothing():
    assert first_line(ValueError("\nbad row\nDetails")) == "bad row"
    assert first_line(MemoryError()) == "MemoryError"
    assert len(first_line("x" * 1000)) == 300


def test_a_full_disk_is_explained_with_place_and_remedy():
    said = explain(OSError(errno.ENOSPC, "No space left on device", "results/a"))
    assert said.startswith("results/a: No space left on device; free some space or set LATENT_")


def test_another_error_of_the_system_is_said_as_it_is():
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "a")) == "a: No such file"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_library_s_own_error_of_a_full_disk_is_known(error):
    known = disk_error(error, Path("models/a"))
    assert (known.errno, known.filename) == (errno.ENOSPC, "models/a")


def test_other_errors_are_no_disk_errors():
    assert disk_error(ValueError("28"), Path("a")) is None
    assert disk_error(FileNotFoundError(errno.ENOENT, "No such file", "a"), Path("a")) is None


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
def test_what_is_being_written_is_named_and_not_left_behind(tmp_path, write):
    with pytest.raises(OSError, match=r"results\.json") as caught:
        with write(tmp_path / "results.json"):
            raise SafetensorError("I/O error: Read-only file system (os error 30)")
    assert caught.value.errno == errno.EROFS
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_files_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_there_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file")
