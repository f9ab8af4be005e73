"""Fingerprints of files from outside: raw rows, base weights, imported models.

Paths are not science. Raw rows, base weights and imported models therefore count by a fingerprint
of their content: moving a folder reruns nothing, changing a row reruns what was made from it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from latent_reasoning.config import ConfigError, Experiment, digest, expand_path, is_local
from latent_reasoning.runtime.files import sha256_of, write_text_atomically

WHOLE_FILE_LIMIT = 256 * 1024**2
"""Larger files (weights) count by their size and both ends, so that planning stays quick."""
END_BYTES = 1024**2
ROW_FILES = (".jsonl", ".json", ".parquet")
"""Suffixes of the files that count in a folder of raw rows."""
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", "merges.txt", "vocab.txt")
"""Suffixes of the files that count in a model folder; the card, with its versions, does not."""
CARD = "card.json"


def content_of_rows(experiment: Experiment) -> str:
    """Digest of the local raw rows of the training, validation and test splits."""
    if experiment.data.source != "local":
        return ""
    return fingerprint(experiment.data.path, "data.path", ROW_FILES)


def content_of_test_set(experiment: Experiment, dataset: str) -> str:
    """Digest of the rows of an extra test set."""
    return fingerprint(experiment.data.extra_tests[dataset], f"data.extra_tests.{dataset}")


def content_of_base(experiment: Experiment) -> str:
    """Digest of the base model's file or folder, if it is local."""
    if experiment.base.source not in ("local", "gguf"):
        return ""
    return fingerprint(experiment.base.path, "base.path")


def content_of_model(experiment: Experiment, model: str, made: bool = False) -> str:
    """Digest of what a model takes from outside: imported weights, or base weights it starts from.

    A base trained by the workflow is an input of the job instead, and a hub id counts by its name.
    An imported folder may be missing until the model is `made`: without its digest a finished model
    would be removed, to be made again in vain.
    """
    entry = experiment.models[model]
    if entry.start == "base":
        return content_of_base(experiment)
    if entry.stage != "import":
        return ""
    if expand_path(entry.path).exists() or (made and is_local(entry.path)):
        return fingerprint(entry.path, f"models.{model}.path")
    return ""


def fingerprint(path: str, key: str, counted: tuple[str, ...] = MODEL_FILES) -> str:
    """Digest of a file's content, or of the names and content of a folder's files.

    In a folder, files whose names end with one of `counted` count: a note beside weights or rows
    reruns nothing. Raises `ConfigError`, naming the configuration's key, if there is no such file.
    """
    location = expand_path(path)
    try:
        if not location.is_dir():
            return _content(location)[:16]
        files = sorted(
            file
            for file in location.iterdir()
            if file.name.endswith(counted) and not file.name.startswith(".")  # as Snakemake's notes
            if file.name != CARD and file.is_file()
        )
        return digest([[file.name, _content(file)] for file in files])
    except OSError as error:
        raise ConfigError(f"{key}: {location}: {error.strerror or error}") from None


def write_model_digest(folder: Path, file: Path) -> None:
    """Write the fingerprint of a complete model folder into a small file.

    Snakemake compares small files by content but folders by time alone: with this file, a fresh
    time stamp retrains nothing.
    """
    write_text_atomically(file, fingerprint(str(folder), str(folder)) + "\n")


def _content(file: Path) -> str:
    size = file.stat().st_size
    if size <= WHOLE_FILE_LIMIT:
        return sha256_of(file)
    with file.open("rb") as stream:
        ends = hashlib.sha256(str(size).encode() + stream.read(END_BYTES))
        stream.seek(size - END_BYTES)
        ends.update(stream.read())
    return ends.hexdigest()
