"""Fingerprints of raw files and model folders; the names of an experiment's files."""

from __future__ import annotations

import pytest

from latent_reasoning.config import PROJECT_ROOT, ConfigError, load, resolve
from latent_reasoning.dag import fingerprints
from latent_reasoning.dag.layout import Layout


def test_a_fingerprint_follows_the_content_and_not_the_path_or_time(tmp_path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other" / "two.jsonl"
    other.parent.mkdir()
    one.write_text("rows", encoding="utf-8")
    other.write_text("rows", encoding="utf-8")
    assert fingerprints.fingerprint(str(one), "key") == fingerprints.fingerprint(str(other), "key")
    other.write_text("ROWS", encoding="utf-8")
    assert fingerprints.fingerprint(str(one), "key") != fingerprints.fingerprint(str(other), "key")


def test_a_folders_fingerprint_counts_names_and_every_file_that_is_loaded(tmp_path):
    def folder(name: str, **files: str) -> str:
        path = tmp_path / name
        path.mkdir()
        for file, content in files.items():
            (path / file).write_text(content, encoding="utf-8")
        return fingerprints.fingerprint(str(path), "key")

    weights = {"model.safetensors": "1", "config.json": "2"}
    first = folder("a", **weights)
    assert folder("b", **weights) == first
    assert folder("c", **{"model.safetensors": "2", "config.json": "1"}) != first
    assert folder("d", **{"model.safetensors": "1"}) != first
    notes = {"README.md": "fine", "card.json": "{}", "notes.txt": "", ".snakemake_timestamp": ""}
    assert folder("e", **weights, **notes) == first
    assert folder("f", **weights, **{"vocab.txt": ""}) != first


def test_a_note_beside_raw_rows_changes_nothing(tmp_path):
    raw = {"experiment": "x", "models": {"sft": {"stage": "sft", "training": {"steps": 1}}}}
    raw |= {"data": {"source": "local", "path": str(tmp_path)}}
    raw |= {"base": {"source": "local", "path": "base"}}
    experiment = resolve(raw, "x.yaml")
    (tmp_path / "train.jsonl").write_text("{}", encoding="utf-8")
    first = fingerprints.content_of_rows(experiment)
    (tmp_path / "README.md").write_text("where they come from", encoding="utf-8")
    assert fingerprints.content_of_rows(experiment) == first
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    assert fingerprints.content_of_rows(experiment) != first


def test_a_models_digest_is_a_small_file_beside_its_folder(tmp_path):
    layout = Layout(tmp_path, base_has_seeds=True)
    folder, file = layout.model("latent-6", 0), layout.model_digest("latent-6", 0)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    fingerprints.write_model_digest(folder, file)
    assert file == folder.parent / "seed-0.sha256"
    assert file.read_text("utf-8") == fingerprints.fingerprint(str(folder), "model") + "\n"
    assert Layout(tmp_path, base_has_seeds=False).model_digest("base", 0).name == "base.sha256"


def test_a_large_file_counts_by_its_size_and_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE_FILE_LIMIT", 10)
    monkeypatch.setattr(fingerprints, "END_BYTES", 4)
    file = tmp_path / "weights"

    def of(content: str) -> str:
        file.write_text(content, encoding="utf-8")
        return fingerprints.fingerprint(str(file), "key")

    first = of("head------tail")
    assert of("head++++++tail") == first
    assert of("HEAD------tail") != first
    assert of("head------TAIL") != first
    assert of("head-------tail") != first


def test_a_file_that_is_not_there_is_named_with_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path: .*nowhere: No such file or directory"):
        fingerprints.fingerprint(str(tmp_path / "nowhere"), "data.path")


def test_an_imported_folder_may_be_missing_until_its_model_is_made(tmp_path):
    path = str(tmp_path / "release")
    models = {
        "theirs": {"stage": "import", "path": path},
        "hub": {"stage": "import", "path": "a/b"},
    }
    experiment = resolve({"experiment": "x", "models": models}, "x.yaml")
    assert fingerprints.content_of_model(experiment, "theirs") == ""
    with pytest.raises(ConfigError, match=r"models\.theirs\.path: .*release: No such file"):
        fingerprints.content_of_model(experiment, "theirs", made=True)
    assert fingerprints.content_of_model(experiment, "hub", made=True) == ""


def test_only_local_sources_have_a_fingerprint():
    laptop = load(PROJECT_ROOT / "config" / "laptop.yaml")
    assert fingerprints.content_of_rows(laptop) == ""
    assert fingerprints.content_of_base(laptop) == ""
    assert fingerprints.content_of_model(laptop, "latent-6-rl") == ""
