"""Fingerprints of files from outside: raw rows, base weights, imported models.

Paths are not science. Raw rows, base weights and imported models therefore count by a fingerprint
of their content: moving a folder reruns nothing, changing a row reruns what was made from it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from latent_reasoning.config import ConfigError, Experiment, digest, expand_path
from latent_reasoning.runtime.files import sha256_of, write_text_atomically

WHOLE_FILE_LIMIT = 256 * 1024**2
"""Larger files (weights) count by their size and both ends, so that planning stays quick."""
END_BYTES = 1024**2
ROW_FILES = (".jsonl", ".parquet")
"""What counts of a folder of raw rows, by the names' ends."""
MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", "merges.txt", "vocab.txt")
"""What counts of a model folder: what is loaded. Notes, and the card with its versions, do not."""
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
    """Digest of the base model's file or folder, where it is a local one."""
    if experiment.base.source not in ("local", "gguf"):
        return ""
    return fingerprint(experiment.base.path, "base.path")


def content_of_model(experiment: Experiment, model: str) -> str:
    """Digest of what a model takes from outside: imported weights, or base weights it starts from.

    A base trained by the workflow counts by its folder instead, and a hub id by its name.
    """
    entry = experiment.models[model]
    if entry.start == "base":
        return content_of_base(experiment)
    if entry.stage == "import" and expand_path(entry.path).exists():
        return fingerprint(entry.path, f"models.{model}.path")
    return ""


def fingerprint(path: str, key: str, counted: tuple[str, ...] = MODEL_FILES) -> str:
    """Digest of a file's content, or of the names and content of a folder's files.

    Of a folder, files whose name ends on one of `counted` count: a note put beside weights or rows
    reruns nothing. Raises `ConfigError` naming the configuration's key where there is no such file.
    """
    location = expand_path(path)
    try:
        if not location.is_dir():
            return _content(location)[:16]
        files = sorted(file for file in location.iterdir() if _counts(file, counted))
        return digest([[file.name, _content(file)] for file in files])
    except OSError as error:
        raise ConfigError(f"{key}: {location}: {error.strerror or error}") from None


def write_model_digest(folder: Path, file: Path) -> None:
    """Write the fingerprint of a model folder, once that is complete, into a small file.

    Snakemake compares small files by content, folders by time alone: with it, a fresh time stamp
    on a model retrains nothing.
    """
    write_text_atomically(file, fingerprint(str(folder), str(folder)) + "\n")


def _counts(file: Path, counted: tuple[str, ...]) -> bool:
    """Hidden files are other programs' notes, such as Snakemake's time stamp of a folder."""
    hidden = file.name.startswith(".")
    return file.name.endswith(counted) and not hidden and file.name != CARD and file.is_file()


def _content(file: Path) -> str:
    size = file.stat().st_size
    if size <= WHOLE_FILE_LIMIT:
        return sha256_of(file)
    with file.open("rb") as stream:
        ends = hashlib.sha256(str(size).encode() + stream.read(END_BYTES))
        stream.seek(size - END_BYTES)
        ends.update(stream.read())
    return ends.hexdigest()
