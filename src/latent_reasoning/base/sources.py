"""Weights from elsewhere: a local folder, a GGUF file, a hub id (docs/method.md, section 3).

Every source gives an ordinary model in float32 with its tokenizer; later stages do not know where
it came from.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from latent_reasoning.config import Base, ConfigError, ImportModel, expand_path, is_local
from latent_reasoning.model.base_files import without_progress_bars
from latent_reasoning.model.bases import UnsupportedBaseError
from latent_reasoning.model.folder import load, load_tokenizer, prepare_tokenizer
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.rival_weights import load_rival
from latent_reasoning.model.tensors import CheckpointError
from latent_reasoning.runtime.files import first_line

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""Files downloaded from a hub repository: no pickled weights, no code."""


def obtain_base(base: Base) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """The base model from the source `local`, `gguf` or `hub`, on the CPU.

    Raises `ConfigError` or `CheckpointError` naming the file or hub id.
    """
    if base.source == "gguf":
        return read_gguf(expand_path(base.path))
    if base.source == "hub":
        remedy = "with base.source: local, base.path takes a local copy"
        folder = fetch(base.hub_id, base.revision, "base.hub_id", remedy)
    else:
        folder = expand_path(base.path)
        if not folder.is_dir():
            raise ConfigError(f"base.path: {folder}: no such folder")
    return load(folder, "cpu"), load_tokenizer(folder)


def obtain_import(name: str, entry: ImportModel) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """A model trained elsewhere, on the CPU: a folder in any format `load` reads or of another
    method's release, or a hub id."""
    folder = expand_path(entry.path)
    if not folder.is_dir():
        if is_local(entry.path):
            raise ConfigError(
                f"models.{name}.path: {folder}: no such folder; download the model into it "
                "(config.json, *.safetensors and the tokenizer's files), or name the folder or hub "
                "id that holds it"
            )
        key = f"models.{name}.path"
        folder = fetch(entry.path, entry.revision, key, f"{key} also takes a local folder")
    if entry.format != "auto":
        return load_rival(folder, entry.format)
    return load(folder, "cpu"), load_tokenizer(folder)


def read_gguf(file: Path) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """Read the model, dequantised to float32, and the tokenizer of a GGUF file."""
    if not file.is_file():
        raise ConfigError(f"base.path: {file}: no such GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("base.source: gguf needs the Python package gguf: pip install gguf")
    options = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, **options
            )
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as GGUF ({error}); download it again, or use another format"
        ) from error
    prepare_tokenizer(tokenizer, file)
    try:
        return LatentReasoner(_forget_quantisation(model), None), tokenizer
    except UnsupportedBaseError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _forget_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model without the GGUF file's quantisation, so that it can be saved."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(model.config).from_dict(settings)
    with without_progress_bars():
        return type(model).from_pretrained(
            None, config=config, state_dict=model.state_dict(), dtype=torch.float32
        )


def fetch(hub_id: str, revision: str | None, key: str, remedy: str) -> Path:
    """Download a hub repository's weights, configuration and tokenizer; returns the local folder.

    `key` is the configuration key that holds the id, `remedy` what to do without a network; the
    `CheckpointError` names both.
    """
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{key}: {hub_id!r} (revision {revision or 'default'}) could not be reached on the "
            f"hub: {reason}; {remedy}"
        ) from error
