"""Errors of a disk, in words."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from latent_reasoning.runtime.files import (
    atomic_directory,
    atomic_file,
    check_writable,
    disk_error,
    explain,
)


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
