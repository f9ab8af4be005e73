"""The stage decode: a model that is there, decoded in another way, without training.

Its folder links the model's weights and has other settings, so that whatever opens a model folder
(evaluation, `ask`, RL) decodes it in that way. How a method decodes is in `model/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latent_reasoning.config import ConfigError, DecodeModel, Experiment
from latent_reasoning.dag.fingerprints import write_model_digest
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data.context import read_pieces
from latent_reasoning.data.sequences import ANSWER_WORDS, COLON
from latent_reasoning.model.card import Origin
from latent_reasoning.model.folder import load, load_tokenizer, read_settings
from latent_reasoning.model.latentseek import SEEK_SETTINGS, SeekSettings
from latent_reasoning.model.links import link_model
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings_file import LATENT_SETTINGS, settings_content
from latent_reasoning.model.soft_thinking import SOFT_THINKING

Files = Mapping[str, Mapping[str, Any]]
"""The JSON files of the new folder that differ from the parent's, by their names."""


def decode_model(experiment: Experiment, name: str, seed: int, digest: str) -> Path:
    """Write the folder of a model of stage decode, which is returned.

    `digest` is that of the keys it depends on. Raises `ConfigError` where its parent cannot be
    decoded so, `CheckpointError` where the parent or the new folder cannot be read.
    """
    entry: Any = experiment.models[name]
    layout = Layout.of(experiment)
    parent, folder = layout.model(entry.start, seed), layout.model(name, seed)
    model = load(parent, "cpu")
    files = DECODERS[entry.method](entry, parent, model, f"models.{name}.from: {entry.start}")
    origin = Origin(experiment, name, "decode", seed, entry.start, digest)
    card = origin.card_of_published(model, experiment.base.licence)
    link_model(parent, folder, files, card | {"selection": f"the weights of {entry.start}"})
    load(folder, "cpu")  # refuses settings that do not fit the weights
    write_model_digest(folder, layout.model_digest(name, seed))
    return folder


def _colar(entry: DecodeModel, parent: Path, model: LatentReasoner, start: str) -> Files:
    """CoLaR at another speed, which is a text in the prompt, or with sampled latent inputs."""
    settings = read_settings(parent)
    if settings is None or settings.speed is None:
        raise ConfigError(
            f"{start} has no speed to change; start from a model that method: colar has trained"
        )
    changed = dataclasses.replace(
        settings,
        speed=settings.speed if entry.speed is None else entry.speed,
        latent_noise=entry.latent_noise,
        noise_seed=entry.noise_seed,
    )
    return {LATENT_SETTINGS: settings_content(changed)}


def _latentseek(entry: DecodeModel, parent: Path, model: LatentReasoner, start: str) -> Files:
    """LatentSeek: the search's settings."""
    if type(model) is not LatentReasoner or model.settings is not None:
        raise ConfigError(
            f"{start} is no plain language model; LatentSeek decodes one that reasons in text, "
            "such as token SFT of form cot"
        )
    return {SEEK_SETTINGS: dataclasses.asdict(SeekSettings(**entry.seek.model_dump()))}


def _soft_thinking(entry: DecodeModel, parent: Path, model: LatentReasoner, start: str) -> Files:
    """Soft Thinking: its settings, and the ids of ` The answer is:`, which ends thinking."""
    if type(model) is not LatentReasoner or model.settings is not None:
        how = "is decoded in its own way" if model.settings is None else "reasons in latent steps"
        raise ConfigError(
            f"{start} {how}; Soft Thinking is for a model that writes its "
            "reasoning, such as an sft model of form cot"
        )
    pieces = read_pieces(load_tokenizer(parent), [ANSWER_WORDS, COLON])
    end = [token for ids in pieces for token in ids]
    return {SOFT_THINKING: entry.soft_thinking.model_dump() | {"end": end}}


DECODERS: dict[str, Callable[[DecodeModel, Path, LatentReasoner, str], Files]] = {
    "colar": _colar,
    "latentseek": _latentseek,
    "soft_thinking": _soft_thinking,
}
"""By method: what makes the files, of an entry, from the folder of the model it starts from, that
model, and how messages name it. Raises `ConfigError` for a model that it cannot decode."""
