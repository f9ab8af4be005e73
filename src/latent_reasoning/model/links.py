"""A model folder of another one's weights, with other settings: nothing is copied.

Files are hard links, so that the folder stays whole whatever becomes of the other one; where the
file system has none they are copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_reasoning.model.card import card_text
from latent_reasoning.runtime.files import (
    SUMS,
    atomic_directory,
    write_json,
    write_sums,
    write_text_atomically,
)

OWN_FILES = ("card.json", "README.md", "training.csv", SUMS)
"""Files of a model folder that say how it was made: a folder of linked weights has its own."""


def link_model(
    parent: Path, folder: Path, settings: Mapping[str, Mapping[str, Any]], card: Mapping[str, Any]
) -> None:
    """Write a model folder with the weights and the tokenizer of `parent`.

    `settings` holds the JSON files that differ or are new, by their names. The folder replaces
    `folder` only when it is complete.
    """
    with atomic_directory(folder) as temporary:
        for file in sorted(parent.iterdir()):
            if file.is_file() and file.name not in (*OWN_FILES, *settings):
                _link(file, temporary / file.name)
        for name, content in settings.items():
            write_json(temporary / name, dict(content))
        write_sums(temporary)
        write_json(temporary / "card.json", dict(card))
        write_text_atomically(temporary / "README.md", card_text(card))


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file.resolve(), link)
    except OSError:
        shutil.copyfile(file, link)
