"""Which keys of the configuration a result depends on, condensed to a digest.

The workflow plans a stage with the digest of its own keys and those of the stages before it, and
the stage refuses a configuration with another digest. A digest holds only the values that differ
from their defaults: a key written out with its default equals one left out, and a key that is new
in the schema leaves every finished model as it is. The price is that a changed default would go
unseen. `workflow/schemas/defaults.json` therefore records the defaults together with `RECIPE`, and
`make lint` refuses a changed default until the stage's recipe is raised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from latent_reasoning.config import (
    ENTRIES,
    RIVAL_STAGES,
    Base,
    ConfigError,
    Data,
    Evaluation,
    Experiment,
    Inside,
    ModelEntry,
    Section,
    digest,
    is_local,
)
from latent_reasoning.config.fields import counts_in, fields_of, section_in, stages_of

RECIPE = {
    "data": 2,
    "base": 1,
    "sft": 1,
    "latent_sft": 1,
    "rl": 3,
    "import": 1,
    **dict.fromkeys(RIVAL_STAGES, 1),
    "evaluation": 2,
    "inside": 2,
}
"""Raised by hand, a stage at a time, when a change of the code changes that stage's result.

The stage and those that depend on it then run again, in every experiment. `data` stands for how
rows are prepared and how every stage reads them.
"""

SCIENTIFIC: dict[str, type[Section]] = {
    "data": Data,
    "base": Base,
    **{f"models.{stage}": entry for stage, entry in ENTRIES.items()},
    "evaluation": Evaluation,
    "inside": Inside,
}
"""The sections whose keys are science, by the stage of `RECIPE` that ends their name.

A key counts for that stage, unless a mark on it says otherwise (`config.fields`).
"""

BASE_FROM_ELSEWHERE = "import"
"""The stage whose keys of `data` count for a base model that is not trained here."""


# -------------------------------------------------------------------------------------- digests


def science(experiment: Experiment, stage: str, model: str | None = None) -> dict[str, Any]:
    """The keys that the result of a stage depends on, including those of the stages before it.

    `stage` is one of data, test_set (an extra one), base, model (with `model`: an entry of
    `models`), evaluation and inside (with `model`). Runtime, tracking and report keys never count,
    nor do paths: files count by their content, which the DAG compares. Values that are defaults are
    left out.
    """
    if stage in ("data", "test_set"):
        keys = departures(experiment.data, stage, section_stage="data")
        return {"recipe": _recipes("data"), "data": keys}
    if stage == "base":
        return _with_base(experiment, {})
    if model not in experiment.models:
        raise ConfigError(
            f"model {model!r} is not in the configuration; it has {', '.join(experiment.models)}"
        )
    keys = _of_chain(experiment, _chain(experiment, model))
    if stage == "model":
        return keys
    if stage == "evaluation":
        entry = experiment.models[model]
        keys["recipe"] |= _recipes("evaluation")
        keys["data"] |= _reading(experiment, "evaluation")
        keys["evaluation"] = departures(experiment.evaluation, "evaluation")
        keys["forced_steps"] = getattr(entry, "forced_steps", None)
        return keys
    if stage == "inside":
        keys = science(experiment, "evaluation", model)
        keys["recipe"] |= _recipes("inside")
        return keys | {"inside": departures(experiment.inside, "inside")}
    raise ValueError(f"unknown stage {stage!r}")


def model_science(experiment: Experiment, name: str) -> dict[str, Any]:
    """The `science` of a model, or of the base model by the name `base`, which its card records."""
    return science(experiment, "base" if name == "base" else "model", name)


def science_digest(experiment: Experiment, stage: str, model: str | None = None) -> str:
    """Digest of `science`; a stage refuses to run if it differs from the planned one."""
    return digest(science(experiment, stage, model))


def check_digest(
    experiment: Experiment, stage: str, expected: str | None, model: str | None = None
) -> str:
    """The stage's digest; raises `ConfigError` if the file changed since the DAG was planned."""
    actual = science_digest(experiment, stage, model)
    if expected is not None and expected != actual:
        raise ConfigError(
            f"the configuration of {model or stage} has digest {actual}, but {expected} was "
            "planned: the file changed after the workflow started; start it again"
        )
    return actual


def departures(
    section: Section, stage: str | None = None, section_stage: str | None = None
) -> dict[str, Any]:
    """The values of a section that differ from its class's defaults, as plain values by their keys.

    With `stage`, only those that the stage's result depends on; `section_stage` is the stage that
    the section's unmarked keys are science for (default: `stage`). A section inside counts by its
    own departures and is left out if it has none, unless it is absent by default (`lora`): then its
    presence counts.
    """
    return _departures(section, stage, frozenset([section_stage or stage or ""]))


def _departures(section: Section, stage: str | None, stages: frozenset[str]) -> dict[str, Any]:
    plain = section.model_dump(mode="json", by_alias=True)
    out: dict[str, Any] = {}
    for key, name, field in fields_of(type(section)):
        if stage is not None and not counts_in(field, section):
            continue
        value, default = getattr(section, name), field.get_default(call_default_factory=True)
        key_stages = stages_of(field, stages)
        counts = stage is None or stage in key_stages
        if isinstance(value, Section):
            inner = _departures(value, stage, key_stages)
            if inner or (counts and not isinstance(default, Section)):
                out[key] = inner
        elif counts and value != default:
            out[key] = plain[key]
    return out


def _recipes(*stages: str) -> dict[str, int]:
    return {stage: RECIPE[stage] for stage in stages}


def _reading(experiment: Experiment, stage: str) -> dict[str, Any]:
    """The dotted keys of `data` that say how a stage reads prepared rows.

    The rows themselves count by their own digest.
    """
    return dict(_dotted(departures(experiment.data, stage, section_stage="data")))


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _with_base(experiment: Experiment, keys: dict[str, Any]) -> dict[str, Any]:
    """`keys` and those of the base model."""
    reader = "base" if experiment.base.source == "scratch" else BASE_FROM_ELSEWHERE
    return {
        "recipe": _recipes("data", "base") | keys.get("recipe", {}),
        "data": _reading(experiment, reader) | keys.get("data", {}),
        "base": departures(experiment.base, "base"),
        "models": keys.get("models", {}),
    }


def _chain(experiment: Experiment, model: str) -> dict[str, Any]:
    """A model, those it starts from and their frozen teachers, by name."""
    chain: dict[str, Any] = {}
    wanted = [model]
    while wanted:
        name = wanted.pop()
        entry = chain[name] = experiment.models[name]
        if entry.start not in (None, "base"):
            wanted.append(entry.start)
        if (teacher := teacher_of(entry)) is not None:
            wanted.append(teacher)
    return chain


def teacher_of(entry: Any) -> str | None:
    """The frozen teacher of an entry of `models`, None if it has none."""
    if entry.stage == "latent_sft" and entry.distillation.teacher != "self":
        return entry.distillation.teacher
    if entry.stage == "teacher_forced" and entry.method == "csft":
        return entry.csft.teacher
    return None


def _of_chain(experiment: Experiment, chain: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {"recipe": _recipes("data"), "data": {}, "models": {}}
    for name, entry in chain.items():
        keys["recipe"] |= _recipes(entry.stage)
        keys["data"] |= _reading(experiment, entry.stage)
        keys["models"][name] = {"stage": entry.stage, **_entry(entry)}
    decodes = any(getattr(entry, "step_decoder", None) for entry in chain.values())
    if decodes or any(entry.start == "base" for entry in chain.values()):
        return _with_base(experiment, keys)
    return keys


def _entry(entry: ModelEntry) -> dict[str, Any]:
    """An entry's own keys; an imported folder counts by its content."""
    own = departures(entry, entry.stage)
    if entry.stage == "import" and entry.path and is_local(entry.path):
        own.pop("path")
    return own


# ------------------------------------------------------------------------------------- defaults


@dataclass(frozen=True)
class Key:
    """A key of the schema: its dotted name, its default as a plain value, and the stages that it
    is science for."""

    name: str
    default: Any
    stages: frozenset[str]


REQUIRED = "(required)"


def keys_of(section: type[Section], prefix: str, stages: frozenset[str]) -> Iterator[Key]:
    """Every key below a section, depth first; `stages` are those of the section.

    A section inside is itself a key if it is absent by default, or if its default sets other values
    than its class.
    """
    for key, _, field in fields_of(section):
        name, key_stages = f"{prefix}.{key}", stages_of(field, stages)
        default = field.get_default(call_default_factory=True)
        inner = section_in(field.annotation)
        if isinstance(default, Section):
            default = departures(default)
        if inner is None or default != {}:
            plain = REQUIRED if default is PydanticUndefined else to_jsonable_python(default)
            yield Key(name, plain, key_stages)
        if inner is not None:
            yield from keys_of(inner, name, key_stages)


def scientific_defaults() -> dict[str, Any]:
    """The default of every key that some result depends on, by the key's dotted name."""
    return {
        key.name: key.default
        for prefix, section in SCIENTIFIC.items()
        for key in keys_of(section, prefix, frozenset([stage_of(prefix)]))
        if key.stages
    }


def defaults_text(recorded: Mapping[str, Any]) -> str:
    """The new content of `defaults.json`, `RECIPE` and all defaults; `recorded` is its present one.

    Raises `ConfigError` if a recorded default has changed but its stage's recipe has not.
    """
    current: dict[str, Any] = {"recipe": RECIPE, "defaults": scientific_defaults()}
    silent = []
    for name, old in recorded.get("defaults", {}).items():
        new, stage = current["defaults"].get(name, old), stage_of(name)
        if new != old and recorded["recipe"].get(stage) == RECIPE[stage]:
            silent.append(
                f"the default of {name} was {json.dumps(old)} and is now {json.dumps(new)}, which "
                "no digest shows: finished results would pass for results of the new default. "
                f"Raise RECIPE[{stage!r}] in src/latent_reasoning/dag/digests.py and run make "
                "docs; or keep the default, and write the new value into the configurations"
            )
    if silent:
        raise ConfigError("\n".join(silent))
    return json.dumps(current, indent=2, ensure_ascii=False) + "\n"


def stage_of(key: str) -> str:
    """The stage of `RECIPE` that a key of `SCIENTIFIC` belongs to."""
    first, *rest = key.split(".")
    return rest[0] if first == "models" else first
