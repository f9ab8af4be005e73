"""Recorded files, read so that whatever nothing has read can be named afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from latent_reasoning.model.folder import load
from latent_reasoning.model.reasoner import LatentReasoner

MODEL_FILES = re.compile(
    r"(config|generation_config|adapter_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|chat_template|model\.safetensors\.index)\.json"
    r"|colar\.json|(projection|gate|latent_head)\.safetensors|(adapter_)?model(-\d+-of-\d+)?\.safetensors"
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
        self._content = {key: _noting(value) for key, value in content.items()}
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._content[key]
        self._read.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def unread(self, information: set[str]) -> Iterator[str]:
        """Paths of the keys that nothing has read; `information` needs no reader."""
        for key, value in self._content.items():
            if key in self._read:
                yield from (f"{key}/{path}" for path in _unread(value, information))
            elif key not in information:
                yield key


def _noting(value: Any) -> Any:
    if isinstance(value, list):
        return [_noting(element) for element in value]
    return Record(value) if isinstance(value, Mapping) else value


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
        self.paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
        """All files and folders."""
        self._records: dict[str, Record] = {}
        self._folders: set[str] = set()

    def file(self, name: str) -> Record:
        """A JSON object, or the arrays of an npz or safetensors file as tensors. Raises `Skip`
        without it."""
        if name not in self.paths:
            raise Skip(f"no file {name}")
        if name not in self._records:
            if name.endswith(".json"):
                content = json.loads((self.root / name).read_text(encoding="utf-8"))
            elif name.endswith(".safetensors"):
                content = load_file(self.root / name)
            else:
                with np.load(self.root / name, allow_pickle=False) as file:
                    content = {key: torch.from_numpy(file[key].copy()) for key in file.files}
            self._records[name] = Record(content)
        return self._records[name]

    def folder(self, name: str) -> Path:
        """A model, an adapter or a tokenizer. Raises `Skip` without it."""
        if name not in self.paths:
            raise Skip(f"no folder {name}")
        self._folders.add(name)
        return self.root / name

    def model(self, name: str) -> LatentReasoner:
        """A checkpoint, loaded anew with every parameter trained. Raises `Skip` without it."""
        return load(self.folder(name), device="cpu").requires_grad_(True)

    def unread(self, information: Mapping[str, set[str]]) -> Iterator[str]:
        """Files, JSON keys and arrays that nothing has read, by their paths.

        The keys of `information`, by the first folder's name, need no reader.
        """
        for name in (path for path in self.paths if not (self.root / path).is_dir()):
            folder, _, file = name.rpartition("/")
            if name in self._records:
                known = information.get(name.partition("/")[0], set())
                yield from (f"{name}/{key}" for key in self._records[name].unread(known))
            elif not (folder in self._folders and MODEL_FILES.fullmatch(file)):
                yield name
