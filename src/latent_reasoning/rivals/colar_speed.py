"""CoLaR decoded at another speed, or with sampled latents (the stage decode).

The speed is a text in the prompt: one set of weights gives a curve of accuracy against length.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from latent_reasoning.config import ConfigError, DecodeModel
from latent_reasoning.model.folder import read_settings
from latent_reasoning.model.settings_file import LATENT_SETTINGS, settings_content


def settings_files(name: str, entry: DecodeModel, parent: Path) -> dict[str, dict[str, Any]]:
    """`latent.json` of the model `name`: that of its parent with the entry's speed and noise.

    Raises `ConfigError` where the parent has no speed.
    """
    settings = read_settings(parent)
    if settings is None or settings.speed is None:
        raise ConfigError(
            f"models.{name}.from: {entry.start} has no speed to change; start from a model that "
            "method: colar has trained"
        )
    changed = dataclasses.replace(
        settings,
        speed=settings.speed if entry.speed is None else entry.speed,
        latent_noise=entry.latent_noise,
        noise_seed=entry.noise_seed,
    )
    return {LATENT_SETTINGS: settings_content(changed)}
