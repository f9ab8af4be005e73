"""The card of a saved model: where it comes from, for people (README.md) and programs (.json)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from latent_reasoning.config import Experiment, Prompt
from latent_reasoning.dag.digests import model_science
from latent_reasoning.model.published import is_published
from latent_reasoning.model.settings_file import read_json

LIBRARIES = ("torch", "transformers", "peft", "tokenizers")


def prompt_prefix(folder: Path) -> str:
    """The prefix of a question in a model's prompts, from its card.

    Without a card it is empty for published checkpoints (conformance note 1), else the default.
    Raises `CheckpointError` where a file is damaged.
    """
    files = folder / "card.json", folder / "config.json"
    card, config = (read_json(file) if file.is_file() else {} for file in files)
    if card.get("prompt_prefix") is not None:
        return card["prompt_prefix"]
    return "" if is_published(config) else Prompt().evaluation


@dataclass(frozen=True)
class Origin:
    """Which model of an experiment a card describes, and what it was made from.

    `parent` is the model it starts from: another model of the experiment, or an id, file or folder;
    `config_digest` is the digest of the keys that the card holds as `science`.
    """

    experiment: Experiment
    model: str
    stage: str
    seed: int
    parent: str | None
    config_digest: str

    def card_of_published(self, model: nn.Module, licence: str | None) -> dict[str, Any]:
        """`card.json` of a model that was imported unchanged."""
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return self._card("as published", {"parameters": parameters}, licence)

    def card_of_trained(
        self,
        *,
        data_digests: Mapping[str, str],
        selection: str,
        metrics: Mapping[str, float | int | None],
        rollbacks: Sequence[str],
    ) -> dict[str, Any]:
        """`card.json` of a model that a stage trained.

        `data_digests` is the SHA-256 of each file of rows that was read, by split; `selection` the
        rule that chose the checkpoint, in words; `rollbacks` when and why the training diverged and
        went back to an earlier checkpoint.
        """
        licences = self.experiment.base.licence, self.experiment.data.licence
        return self._card(selection, metrics, *licences, data_digests, rollbacks)

    def _card(
        self,
        selection: str,
        metrics: Mapping[str, float | int | None],
        weights_licence: str | None,
        data_licence: str | None = None,
        data_digests: Mapping[str, str] = MappingProxyType({}),
        rollbacks: Sequence[str] = (),
    ) -> dict[str, Any]:
        return {
            "experiment": self.experiment.experiment,
            "model": self.model,
            "stage": self.stage,
            "seed": self.seed,
            "parent": self.parent,
            "config_digest": self.config_digest,
            "science": model_science(self.experiment, self.model),
            "data_digests": dict(data_digests),
            "selection": selection,
            "prompt_prefix": self.experiment.data.prompt.evaluation,
            "metrics": dict(metrics),
            "rollbacks": list(rollbacks),
            "licence": {"weights": weights_licence, "data": data_licence},
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in LIBRARIES},
            },
        }


def card_text(card: Mapping[str, Any]) -> str:
    """`README.md` of a model folder."""
    licence = card.get("licence") or {}
    facts = {
        "Experiment": card.get("experiment"),
        "Stage": card.get("stage"),
        "Seed": card.get("seed"),
        "Started from": card.get("parent") or "nothing",
        "Checkpoint chosen": card.get("selection"),
        "Configuration digest": card.get("config_digest"),
        "Licence of the weights": licence.get("weights") or "not stated",
        "Licence of the data": licence.get("data") or "not stated",
    }
    lines = [f"# {card.get('model')}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    sections = {
        "Metrics": card.get("metrics"),
        "Data (SHA-256)": card.get("data_digests"),
        "Versions": card.get("versions"),
    }
    for title, values in sections.items():
        if values:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {_shown(value)} |" for name, value in values.items()]
    if card.get("rollbacks"):
        lines += ["", "## Rollbacks", "", "The training diverged and went back:", ""]
        lines += [f"- {rollback}" for rollback in card["rollbacks"]]
    lines += [
        "",
        "Load it with `latent_reasoning.model.load(folder)`. Without that package the folder is a "
        "plain Hugging Face model, which does not reason in latent steps.",
    ]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
