"""Files and folders that are whole or not there."""

from __future__ import annotations

import contextlib

from latent_reasoning.runtime.files import SUMS, atomic_directory, changed_files, write_sums


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
