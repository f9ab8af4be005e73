"""LatentSeek, a way to decode a token model (stage decode); the search is `model/latentseek.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from latent_reasoning.config import ConfigError, DecodeModel
from latent_reasoning.model.folder import load
from latent_reasoning.model.latentseek import SEEK_SETTINGS, SeekSettings
from latent_reasoning.model.reasoner import LatentReasoner


def settings_files(name: str, entry: DecodeModel, parent: Path) -> dict[str, dict[str, Any]]:
    """`seek.json` of the model `name`.

    Raises `ConfigError` where the parent is no plain language model.
    """
    model = load(parent, "cpu")
    if type(model) is not LatentReasoner or model.settings is not None:
        raise ConfigError(
            f"models.{name}.from: {entry.start} is no plain language model; LatentSeek decodes one "
            "that reasons in text, such as token SFT of form cot"
        )
    return {SEEK_SETTINGS: dataclasses.asdict(SeekSettings(**entry.seek.model_dump()))}
