"""The published checkpoint format: the authors' names for settings and weights.

See docs/method.md, last section. Its `config.json` is the base architecture's plus one key with the
latent settings; the names of the base model's weights begin with `_base_model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latent_reasoning.model.settings import LatentSettings

SETTINGS_KEY = "_inserted_LatentThinkingModelSettings"
FILTERS = {None: "none", "MLP": "MLP"}
"""`recurrent_filter_mode` -> our name; the parameter names of other filters are not known."""

PUBLISHED_BASE = "_base_model."
"""Begins the published names of the base model's weights."""

IGNORED = ("debug_mode", "unused_token_ids")
IGNORED_PREFIX = "disable_"
READ = {
    "start_token_id": "start_id",
    "end_token_id": "end_id",
    "continue_token_id": "continue_id",
    "stop_token_id": "stop_id",
    "binary_head_temp": "stop_head_temperature",
    "detach_binary_head_inputs": "detach_stop_head",
}


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a published checkpoint."""
    return SETTINGS_KEY in config


def read_settings(published: dict[str, Any]) -> LatentSettings:
    """Our settings for a published mapping; START may follow STOP, as in the public code.

    Raises `ValueError` for anything unsupported: other filters, `add_latent_to_end`, unknown keys.
    """
    known = {*READ, "recurrent_filter_mode", "lora_mode", "add_latent_to_end", *IGNORED}
    unknown = [k for k in published if k not in known and not k.startswith(IGNORED_PREFIX)]
    if unknown:
        raise ValueError(f"{SETTINGS_KEY}: unknown settings {', '.join(sorted(unknown))}")
    if published.get("add_latent_to_end"):
        raise ValueError(f"{SETTINGS_KEY}.add_latent_to_end: true is not supported")
    name = published.get("recurrent_filter_mode")
    if name not in FILTERS:
        raise ValueError(
            f"{SETTINGS_KEY}.recurrent_filter_mode: {name!r} is not supported; the published "
            "parameter names are known for MLP and null only"
        )
    missing = [key for key in list(READ)[:4] if published.get(key) is None]
    if missing:
        raise ValueError(f"{SETTINGS_KEY}: {', '.join(missing)} missing")
    return LatentSettings(
        **{ours: published[key] for key, ours in READ.items() if published.get(key) is not None},
        recurrent_filter=FILTERS[name],
        allow_rethinking=True,
        special_rows="modules" if published.get("lora_mode") else "embedding",
    )


def our_name(name: str) -> str:
    """Name in `LatentReasoner.state_dict()` of a published parameter."""
    if name.startswith(PUBLISHED_BASE):
        return "base." + name.removeprefix(PUBLISHED_BASE)
    module, _, rest = name.partition(".")
    if module.startswith("_") and "_embed" in module:
        return f"special_rows.{module[1:].replace('_embed', '')}.{rest}"
    return name


def published_name(name: str) -> str:
    """Published name of a parameter of `LatentReasoner.state_dict()`: the inverse of `our_name`."""
    if name.startswith("base."):
        return PUBLISHED_BASE + name.removeprefix("base.")
    if name.startswith("special_rows."):
        _, row, rest = name.split(".", 2)
        token, _, side = row.partition("_")
        return f"_{token}_embed" + (f"_{side}" if side else "") + f".{rest}"
    return name
