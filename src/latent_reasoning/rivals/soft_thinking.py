"""Soft Thinking as a way to decode a model of chains of thought (the stage decode)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_reasoning.config import ConfigError, DecodeModel
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.sequences import ANSWER_WORDS, COLON
from latent_reasoning.model.folder import load_tokenizer, read_settings
from latent_reasoning.model.soft_thinking import SOFT_THINKING


def settings_files(name: str, entry: DecodeModel, parent: Path) -> dict[str, dict[str, Any]]:
    """`soft_thinking.json` of the model `name`: the entry's settings, and the ids of
    ` The answer is:`, which ends thinking.

    Raises `ConfigError` where the parent does not think in words.
    """
    if read_settings(parent) is not None:
        raise ConfigError(
            f"models.{name}.from: {entry.start} reasons in latent steps; Soft Thinking is for a "
            "model that writes its reasoning, such as an sft model of form cot"
        )
    pieces = read_pieces(load_tokenizer(parent), [ANSWER_WORDS, COLON])
    end = [token for ids in pieces for token in ids]
    return {SOFT_THINKING: entry.soft_thinking.model_dump() | {"end": end}}
