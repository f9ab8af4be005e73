"""Fingerprints of raw files, values of the command line, the resolved configuration on disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from latent_reasoning import planning
from latent_reasoning.config import PROJECT_ROOT, ConfigError, load


def test_a_fingerprint_follows_the_content_and_not_the_path_or_time(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other" / "two.jsonl"
    other.parent.mkdir()
    one.write_text("rows", encoding="utf-8")
    other.write_text("rows", encoding="utf-8")
    assert planning.fingerprint(str(one), "key") == planning.fingerprint(str(other), "key")
    other.write_text("ROWS", encoding="utf-8")
    assert planning.fingerprint(str(one), "key") != planning.fingerprint(str(other), "key")


def test_a_folders_fingerprint_counts_names_and_every_file(tmp_path):
    def folder(name: str, **files: str) -> str:
        path = tmp_path / name
        path.mkdir()
        for file, content in files.items():
            (path / file).write_text(content, encoding="utf-8")
        return planning.fingerprint(str(path), "key")

    first = folder("a", train="1", test="2")
    assert folder("b", train="1", test="2") == first
    assert folder("c", train="2", test="1") != first
    assert folder("d", train="1") != first
    assert folder("e", train="1", test="2", **{".snakemake_timestamp": ""}) == first


def test_a_large_file_counts_by_its_size_and_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "WHOLE_FILE_LIMIT", 10)
    monkeypatch.setattr(planning, "END_BYTES", 4)
    file = tmp_path / "weights"

    def of(content: str) -> str:
        file.write_text(content, encoding="utf-8")
        return planning.fingerprint(str(file), "key")

    first = of("head------tail")
    assert of("head++++++tail") == first
    assert of("HEAD------tail") != first
    assert of("head------TAIL") != first
    assert of("head-------tail") != first


def test_a_file_that_is_not_there_is_named_with_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path: .*nowhere: No such file or directory"):
        planning.fingerprint(str(tmp_path / "nowhere"), "data.path")


def test_only_local_sources_have_a_fingerprint():
    laptop = load(PROJECT_ROOT / "config" / "laptop.yaml")
    assert planning.content_of_rows(laptop) == ""
    assert planning.content_of_base(laptop) == ""
    assert planning.content_of_model(laptop, "latent-6-rl") == ""


def test_lists_of_the_command_line_hold_numbers_again():
    given = {"seeds": ["0", "1"], "runtime": {"device": "cpu", "threads": "2"}, "experiment": "x"}
    assert planning.command_line_values(given) == {
        "seeds": [0, 1],
        "runtime": {"device": "cpu", "threads": 2},
        "experiment": "x",
    }
    assert planning.command_line_values({"report": {"main": "null"}}) == {"report": {"main": None}}
    assert planning.command_line_values({"data": {"revision": "2025-11-01"}}) == {
        "data": {"revision": "2025-11-01"}
    }


def test_the_resolved_configuration_is_rewritten_only_where_it_differs(tmp_path: Path):
    experiment = load(PROJECT_ROOT / "config" / "test.yaml")
    path = tmp_path / "results" / "test" / "config.yaml"
    planning.write_config(experiment, path)
    written = path.stat().st_mtime_ns
    planning.write_config(experiment, path)
    assert path.stat().st_mtime_ns == written
    assert load(path) == experiment


def test_files_dated_in_the_future_are_dated_now_and_others_left(tmp_path):
    for name, date in (("past", 1000.0), ("future", time.time() + 86400)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (date, date))
    assert planning.forget_future(tmp_path) == 1
    assert (tmp_path / "past").stat().st_mtime == 1000.0
    assert (tmp_path / "future").stat().st_mtime <= time.time()
    assert planning.forget_future(tmp_path) == 0
