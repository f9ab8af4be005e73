"""Weights from elsewhere, and clear errors where they are not to be had."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from latent_reasoning.base.sources import obtain_base, obtain_import, read_gguf
from latent_reasoning.config import Base, ConfigError, ImportModel
from latent_reasoning.model import folder as checkpoints
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.tensors import CheckpointError
from tests.model.models import build_base, build_reasoner, build_tokenizer


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_a_local_folder_becomes_the_base(tmp_path):
    model = LatentReasoner(build_base().float(), None)
    checkpoints.save(model, build_tokenizer(special=False), tmp_path / "m", {})
    read, tokenizer = obtain_base(Base(source="local", path=str(tmp_path / "m")))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.state_dict().items())
    assert len(tokenizer) == 30


def test_a_missing_local_folder_is_named_with_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"base\.path: .*/nowhere: no such folder"):
        obtain_base(Base(source="local", path=str(tmp_path / "nowhere")))


def test_an_unreachable_hub_id_is_named_with_the_key_for_a_local_copy(offline):
    base = Base(source="hub", hub_id="somebody/some-model", revision="abc")
    with pytest.raises(
        CheckpointError,
        match=r"base\.hub_id: 'somebody/some-model' \(revision abc\) could not be reached"
        r".*base\.source: local, base\.path",
    ):
        obtain_base(base)


def test_an_import_is_a_folder_or_a_hub_id(tmp_path, offline):
    checkpoints.save(build_reasoner().float(), build_tokenizer(), tmp_path / "m", {})
    model, _ = obtain_import("theirs", ImportModel(path=str(tmp_path / "m")))
    assert model.settings is not None
    with pytest.raises(ConfigError, match=r"models\.theirs\.path: .*/nowhere: no such folder"):
        obtain_import("theirs", ImportModel(path=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match=r"models\.theirs\.path: 'somebody/some-model'"):
        obtain_import("theirs", ImportModel(path="somebody/some-model"))


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"base\.path: .*/m\.gguf: no such GGUF file"):
        obtain_base(Base(source="gguf", path=str(tmp_path / "m.gguf")))


def test_the_missing_gguf_package_is_named_with_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name)
    )
    with pytest.raises(ConfigError, match="pip install gguf"):
        read_gguf(tmp_path / "m.gguf")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
def test_a_damaged_gguf_file_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckpointError, match=r"m\.gguf: cannot be read as GGUF"):
        read_gguf(tmp_path / "m.gguf")


@pytest.mark.skipif(
    not os.environ.get("LATENT_REASONING_BASE", "").endswith(".gguf"),
    reason="LATENT_REASONING_BASE names no GGUF file",
)
def test_a_real_gguf_file_is_saved_and_loaded_to_the_last_bit(tmp_path):
    model, tokenizer = read_gguf(Path(os.environ["LATENT_REASONING_BASE"]))
    checkpoints.save(model, tokenizer, tmp_path / "m", {"model": "base"})
    again = checkpoints.load(tmp_path / "m", device="cpu")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    assert checkpoints.load_tokenizer(tmp_path / "m").pad_token is not None
