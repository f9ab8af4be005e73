"""The stage decode: a model that is there, decoded in another way, without training.

Its folder links the model's weights and has other settings, so that whatever opens a model folder
(evaluation, `ask`, RL) decodes it in that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from latent_reasoning.config import Experiment
from latent_reasoning.dag.fingerprints import write_model_digest
from latent_reasoning.dag.layout import Layout
from latent_reasoning.model.card import Origin
from latent_reasoning.model.folder import load
from latent_reasoning.model.links import link_model

DECODERS = {
    "colar": "colar_speed",
    "latentseek": "latentseek",
    "soft_thinking": "soft_thinking",
}
"""By method: the module below `latent_reasoning.rivals` whose `settings_files` has the name of the
model, its entry and the folder of the model it starts from, and returns the JSON files of the new
folder that differ, by their names. It raises `ConfigError` for a model that it cannot decode."""


def decode_model(experiment: Experiment, name: str, seed: int, digest: str) -> Path:
    """Write the folder of a model of stage decode, which is returned.

    `digest` is that of the keys it depends on. Raises `ConfigError` where its parent cannot be
    decoded so, `CheckpointError` where the parent or the new folder cannot be read.
    """
    entry: Any = experiment.models[name]
    layout = Layout.of(experiment)
    parent, folder = layout.model(entry.start, seed), layout.model(name, seed)
    module = import_module(f"latent_reasoning.rivals.{DECODERS[entry.method]}")
    files: Mapping[str, Mapping[str, Any]] = module.settings_files(name, entry, parent)
    origin = Origin(experiment, name, "decode", seed, entry.start, digest)
    card = origin.card_of_published(load(parent, "cpu"), experiment.base.licence)
    link_model(parent, folder, files, card | {"selection": f"the weights of {entry.start}"})
    load(folder, "cpu")  # refuses settings that do not fit the weights
    write_model_digest(folder, layout.model_digest(name, seed))
    return folder
