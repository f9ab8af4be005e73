"""`latent.json`: the latent settings of a model folder, read strictly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.tensors import REMEDY, CheckpointError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

LATENT_SETTINGS = "latent.json"
RIVAL_SETTINGS = {
    *("filter_width", "filter_norm", "deterministic_latents", "latent_noise", "noise_seed"),
    *("prompt_suffix", "speed", "stop_rule", "marker_id", "answer_text"),
    *("mixture_size", "mixture_temperature"),
}
"""Keys of `latent.json` that are written only where they are not the defaults."""
LATER_SETTINGS = {"max_latent_steps", *RIVAL_SETTINGS}
"""Keys of `latent.json` that a folder may lack; the defaults then hold."""


def settings_content(settings: LatentSettings) -> dict[str, Any]:
    """What `latent.json` holds: folders of models without a rival's settings are as they were."""
    own, defaults = dataclasses.asdict(settings), LatentSettings(*(0,) * 4)
    return {
        name: value
        for name, value in own.items()
        if name not in RIVAL_SETTINGS or value != getattr(defaults, name)
    }


def read_latent_settings(file: Path) -> LatentSettings:
    """The settings in a `latent.json`. Raises `CheckpointError`."""
    return read_as(LatentSettings, file, optional=LATER_SETTINGS)


def read_as(kind: type[Settings], file: Path, optional: Collection[str] | None = None) -> Settings:
    """The settings of a `kind`, a dataclass, in a JSON file. Raises `CheckpointError`.

    What the file may lack is `optional`; None: all that has a default.
    """
    content: Any = read_json(file)
    known = {field.name for field in dataclasses.fields(kind)}
    needed: set[str] = set() if optional is None else known.difference(optional)
    if wrong := (set(content) - known) | (needed - set(content)):
        names = ", ".join(sorted(wrong))
        raise CheckpointError(f"{file}: unknown or missing settings: {names}; {REMEDY}")
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{file}: {place}: {first['msg']}; {REMEDY}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises `CheckpointError`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); {REMEDY}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no mapping; {REMEDY}")
    return content
