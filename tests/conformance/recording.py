"""Recorded files, read so that whatever nothing has read can be named afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_reasoning.model.folder import load
from latent_reasoning.model.reasoner import LatentReasoner

MODEL_FILES = re.compile(
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|chat_template|model\.safetensors\.index)\.json"
    r"|(adapter_)?model(-\d+-of-\d+)?\.safetensors"
    r"|merges\.txt|vocab\.txt|tokenizer\.model|chat_template\.jinja|README\.md"
)
"""What a folder of a model, an adapter or a tokenizer may hold; the project reads it itself."""


class Skip(Exception):  # noqa: N818 (a verdict, not an error)
    """Raised where a case cannot be replayed with what the folder holds; the message says why."""


class Record(Mapping[str, Any]):
    """A JSON object, or the arrays of a file, that notes which of its keys were read.

    Asking whether a key is there and listing the keys is not reading. Objects below are records
    too, also those in lists.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._read: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._read:
            self._read[key] = _noting(self._content[key])
        return self._read[key]

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def unread(self, information: set[str]) -> Iterator[str]:
        """Paths of the keys that nothing has read; `information` needs no reader."""
        for key in self:
            if key in self._read:
                yield from (f"{key}/{path}" for path in _unread(self._read[key], information))
            elif key not in information:
                yield key


def _noting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Record(value)
    if isinstance(value, list) and any(isinstance(element, Mapping) for element in value):
        return [_noting(element) for element in value]
    return value


def _unread(value: Any, information: set[str]) -> Iterator[str]:
    if isinstance(value, Record):
        yield from value.unread(information)
    elif isinstance(value, list):
        for index, element in enumerate(value):
            yield from (f"{index}/{path}" for path in _unread(element, information))


class Vectors:
    """A folder of vectors; files go by their path from its root, as in the cases' names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records: dict[str, Record] = {}
        self._folders: set[str] = set()

    def names(self, pattern: str) -> list[str]:
        """The files and folders that a pattern finds, in order."""
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    def file(self, name: str) -> Record:
        """A JSON object, or the arrays of an npz file as tensors. Raises `Skip` without it."""
        path = self.root / name
        if not path.exists():
            raise Skip(f"no file {name}")
        if name not in self._records:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
            else:
                with np.load(path, allow_pickle=False) as file:
                    content = {key: torch.from_numpy(file[key].copy()) for key in file.files}
            self._records[name] = Record(content)
        return self._records[name]

    def folder(self, name: str) -> Path:
        """A model, an adapter or a tokenizer. Raises `Skip` without it."""
        if not (self.root / name).is_dir():
            raise Skip(f"no folder {name}")
        self._folders.add(name)
        return self.root / name

    def model(self, name: str) -> LatentReasoner:
        """A checkpoint, loaded anew with every parameter trained. Raises `Skip` without it."""
        return load(self.folder(name), device="cpu").requires_grad_(True)

    def unread(self, information: Mapping[str, set[str]], other_files: str) -> Iterator[str]:
        """What nothing has read: files, JSON keys and arrays, by their paths.

        The keys of `information`, by the folder's name, need no reader, nor do the files that the
        pattern `other_files` fits.
        """
        for path in sorted(self.root.rglob("*")):
            name, folder = (p.relative_to(self.root).as_posix() for p in (path, path.parent))
            if path.is_dir() or re.fullmatch(other_files, name):
                continue
            if name in self._records:
                known = information.get(name.partition("/")[0], set())
                unread = self._records[name].unread(known)
                yield from (f"{name}/{key}" for key in unread)
            elif not (folder in self._folders and MODEL_FILES.fullmatch(path.name)):
                yield name
