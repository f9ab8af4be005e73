"""Which keys changed since results were made, which a new digest alone does not show.

Results keep the science that they were made with (`digests.science`): a model on its card, prepared
rows and evaluations in their summaries. A key that is not recorded had its default, as in a digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from latent_reasoning.config import Experiment
from latent_reasoning.dag.digests import model_science, science, scientific_defaults
from latent_reasoning.dag.layout import Layout

Change = tuple[str, Any, Any]
"""A key's dotted name, its value when the result was made, and its value now."""

_defaults = cache(scientific_defaults)
ABSENT = object()
KINDS = ("stage", "source")
"""If one of these differs, it alone is reported: most keys beside it mean something else."""


def changed_keys(experiment: Experiment, layout: Layout) -> list[str]:
    """A line for each key whose change makes a finished result run again, such as

    `latent-6 seed 0: training.learning_rate 0.001 -> 0.002`.

    A result's own keys have short names, those of what it was made from have full names. A result
    that is missing or recorded no science has no line.
    """
    lines = []
    for title, prefix, changes in _changes_of_results(experiment, layout):
        for name, old, new in changes:
            lines.append(f"{title}: {name.removeprefix(prefix)} {_shown(old)} -> {_shown(new)}")
    return lines


def differences(
    experiment: Experiment, recorded: Mapping[str, Any], current: Mapping[str, Any]
) -> list[Change]:
    """The keys that differ between a recorded science and today's.

    A part that only one of them holds (another parent, a base, a stage's recipe) is left out: the
    key that brought it in, `from` or `teacher`, differs as well.
    """
    changes: list[Change] = []
    for part in ("recipe", "data", "base", "evaluation", "forced_steps"):
        if part in recorded and part in current:
            changes += _compare(part, part, recorded[part], current[part])
    models, models_now = recorded.get("models", {}), current.get("models", {})
    for name in models_now:
        if name in models:
            stage = f"models.{experiment.models[name].stage}"
            changes += _compare(f"models.{name}", stage, models[name], models_now[name])
    return [
        change for change in changes if not (change[0].startswith("recipe.") and ABSENT in change)
    ]


def _compare(name: str, schema_name: str, old: Any, new: Any) -> Iterator[Change]:
    """The differences below a key; `schema_name` is its name in the table of defaults."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        values = {key: _both(f"{schema_name}.{key}", key, old, new) for key in {**old, **new}}
        of_another_kind = [
            key for key in KINDS if key in values and values[key][0] != values[key][1]
        ]
        for key in of_another_kind or values:
            yield from _compare(f"{name}.{key}", f"{schema_name}.{key}", *values[key])
    elif old != new:
        yield name, old, new


def _both(
    schema_name: str, key: str, old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[Any, Any]:
    """A key's old and new value; a key that a science leaves out has its default."""
    default = _defaults().get(schema_name, ABSENT)
    if default is not None and isinstance(old.get(key, new.get(key)), Mapping):
        default = {}
    return old.get(key, default), new.get(key, default)


def _changes_of_results(
    experiment: Experiment, layout: Layout
) -> Iterator[tuple[str, str, list[Change]]]:
    """Each result's title, the prefix of its own keys, and what changed."""

    def changes(file: Path, current: Mapping[str, Any]) -> list[Change]:
        return differences(experiment, _recorded(file), current)

    yield "data", "data.", changes(layout.data_summary, science(experiment, "data"))
    base = model_science(experiment, "base")
    for seed in experiment.seeds if layout.base_has_seeds else experiment.seeds[:1]:
        title = f"base seed {seed}" if layout.base_has_seeds else "base"
        yield title, "base.", changes(layout.base(seed) / "card.json", base)
    for model in experiment.models:
        own = model_science(experiment, model)
        evaluated = science(experiment, "evaluation", model)
        for seed in experiment.seeds:
            title = f"{model} seed {seed}"
            of_model = changes(layout.model(model, seed) / "card.json", own)
            yield title, f"models.{model}.", of_model
            for dataset in experiment.evaluation.datasets:
                file = layout.evaluation(model, seed, dataset) / "summary.json"
                further = [c for c in changes(file, evaluated) if c not in of_model]
                yield f"evaluation of {title} on {dataset}", "evaluation.", further


def _recorded(file: Path) -> dict[str, Any]:
    """The science in a JSON file; empty if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = content.get("science") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def _shown(value: Any) -> str:
    """A value as a configuration file would write it."""
    if value is ABSENT:
        return "(not a key)"
    plain = isinstance(value, str) and value and value == value.strip()
    return value if plain else json.dumps(value, ensure_ascii=False)
