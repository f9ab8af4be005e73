"""Which keys of the configuration a result depends on, condensed to a digest.

The workflow plans a stage with the digest of its own keys and of those before it, and the stage
refuses a configuration of another digest. A digest holds the values that differ from their
defaults, and no others: a key written out with its default is the same as one left out, and a
key that is new in the schema leaves every finished model as it is. The price is that a changed
default would go unseen. `workflow/schemas/defaults.json` therefore records the defaults together
with `RECIPE`, and `make lint` refuses a changed one until the stage's recipe is raised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic_core import PydanticUndefined, to_jsonable_python

from latent_reasoning.config import (
    Base,
    ConfigError,
    Data,
    Evaluation,
    Experiment,
    ImportModel,
    LatentSftModel,
    ModelEntry,
    RlModel,
    Section,
    SftModel,
    digest,
    is_local,
)

RECIPE = {
    "data": 1,
    "base": 1,
    "sft": 1,
    "latent_sft": 1,
    "rl": 2,
    "import": 1,
    "evaluation": 1,
}
"""Raised by hand, a stage at a time, when a change of the code changes that stage's result.

The stage and those that depend on it then run again, in every experiment. `data` stands for how
rows are prepared and how every stage reads them.
"""

SCIENTIFIC: dict[str, type[Section]] = {
    "data": Data,
    "base": Base,
    "models.sft": SftModel,
    "models.latent_sft": LatentSftModel,
    "models.rl": RlModel,
    "models.import": ImportModel,
    "evaluation": Evaluation,
}
"""The sections whose keys are science, by the stage of `RECIPE` that ends their name."""

NOT_SCIENCE = {
    "data": {"path", "licence", "extra_tests"},
    "base": {"path", "licence"},
    "import": {"licence"},
    "evaluation": {"datasets"},
}
"""Keys of those sections that change no result: files count by their content (`planning.py`)."""

READ_BY = {
    "base": ("prompt.training", "prompt.evaluation", "max_tokens", "special_token_text"),
    "sft": (
        "prompt.training",
        "prompt.evaluation",
        "max_tokens",
        "special_token_text",
        "natural_language",
    ),
    "latent_sft": (
        "prompt.training",
        "prompt.evaluation",
        "max_tokens",
        "special_token_text",
        "natural_language",
        "drop_negative_for_sft",
    ),
    "rl": ("prompt.evaluation", "special_token_text"),
    "import": ("prompt.evaluation",),
    "evaluation": ("prompt.evaluation", "special_token_text"),
}
"""Keys of `data` that say how a stage reads prepared rows; the rows count by their own digest.

Every stage writes the evaluation prompt on its model's card.
"""

BASE_FROM_ELSEWHERE = "import"
"""A base model that is not trained here reads no rows, as an imported one."""

SOURCE_KEYS = {"generated": {"generated"}, "local": set(), "hub": {"hub_id", "revision"}}
"""Keys of `data` that belong to one source."""


# -------------------------------------------------------------------------------------- digests


def science(experiment: Experiment, stage: str, model: str | None = None) -> dict[str, Any]:
    """The keys that the result of a stage depends on, those of the stages before it included.

    `stage` is one of data, test_set (an extra one), base, model (with `model`: an entry of
    `models`) and evaluation (with `model`). Runtime, tracking and report keys are in none of them,
    nor are paths: files count by their content, which the DAG compares. Values that are defaults
    are left out.
    """
    if stage == "data":
        return {"recipe": _recipes("data"), "data": _data(experiment.data)}
    if stage == "test_set":
        bad_rows = _picked(departures(experiment.data), ("on_bad_row",))
        return {"recipe": _recipes("data"), "data": bad_rows}
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
        keys["evaluation"] = _without(departures(experiment.evaluation), "evaluation")
        keys["forced_steps"] = getattr(entry, "forced_steps", None)
        return keys
    raise ValueError(f"unknown stage {stage!r}")


def science_digest(experiment: Experiment, stage: str, model: str | None = None) -> str:
    """Digest of `science`; a stage refuses to run where it differs from the planned one."""
    return digest(science(experiment, stage, model))


def check_digest(
    experiment: Experiment, stage: str, expected: str | None, model: str | None = None
) -> str:
    """The stage's digest; raises `ConfigError` where the file changed since the DAG was planned."""
    actual = science_digest(experiment, stage, model)
    if expected is not None and expected != actual:
        raise ConfigError(
            f"the configuration of {model or stage} has digest {actual}, but {expected} was "
            "planned: the file changed after the workflow started; start it again"
        )
    return actual


def departures(section: Section) -> dict[str, Any]:
    """What a section sets otherwise than its own class does, as plain values by the file's keys.

    A section inside counts by its own departures, and is left out where there are none, unless its
    default is to be absent (`lora`): then being there says something.
    """
    plain = section.model_dump(mode="json", by_alias=True)
    out: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        default = field.get_default(call_default_factory=True)
        if isinstance(value, Section):
            inner = departures(value)
            if inner or not isinstance(default, Section):
                out[key] = inner
        elif value != default:
            out[key] = plain[key]
    return out


def _recipes(*stages: str) -> dict[str, int]:
    return {stage: RECIPE[stage] for stage in stages}


def _without(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    left_out = NOT_SCIENCE.get(stage, set())
    return {key: value for key, value in values.items() if key not in left_out}


def _data(data: Data) -> dict[str, Any]:
    """Keys that the prepared rows depend on: neither how they are read nor another source's."""
    other_sources = set().union(*SOURCE_KEYS.values()) - SOURCE_KEYS[data.source]
    read_later = {key.split(".")[0] for keys in READ_BY.values() for key in keys}
    own = _without(departures(data), "data")
    if data.augmentation.method == "none":
        own.pop("augmentation", None)
    return {key: own[key] for key in own if key not in other_sources | read_later}


def _reading(experiment: Experiment, stage: str) -> dict[str, Any]:
    return _picked(departures(experiment.data), READ_BY[stage])


def _picked(values: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The values at dotted keys, by these keys; those that are not there are left out."""
    out = {}
    for key in keys:
        node: Any = values
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            out[key] = node
    return out


def _with_base(experiment: Experiment, keys: dict[str, Any]) -> dict[str, Any]:
    """`keys` and those of the base model."""
    base = experiment.base
    scratch = base.source == "scratch"
    unused = {"hub_id", "revision"} if scratch else {"architecture", "texts", "training"}
    own = _without(departures(base), "base")
    return {
        "recipe": _recipes("data", "base") | keys.get("recipe", {}),
        "data": _reading(experiment, "base" if scratch else BASE_FROM_ELSEWHERE)
        | keys.get("data", {}),
        "base": {key: value for key, value in own.items() if key not in unused},
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
        if entry.stage == "latent_sft" and entry.distillation.teacher != "self":
            wanted.append(entry.distillation.teacher)
    return chain


def _of_chain(experiment: Experiment, chain: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {"recipe": _recipes("data"), "data": {}, "models": {}}
    for name, entry in chain.items():
        keys["recipe"] |= _recipes(entry.stage)
        keys["data"] |= _reading(experiment, entry.stage)
        keys["models"][name] = {"stage": entry.stage, **_entry(entry)}
    if any(entry.start == "base" for entry in chain.values()):
        return _with_base(experiment, keys)
    return keys


def _entry(entry: ModelEntry) -> dict[str, Any]:
    """An entry's own keys; how many latent steps evaluation forces is evaluation's."""
    own = _without(departures(entry), entry.stage)
    own.pop("forced_steps", None)
    if entry.stage == "import" and entry.path and is_local(entry.path):
        own.pop("path")
    return own


# ------------------------------------------------------------------------------------- defaults


@dataclass(frozen=True)
class Key:
    """A key of the schema: its dotted name, and its default as a plain value."""

    name: str
    default: Any


REQUIRED = "(required)"


def keys_of(section: type[Section], prefix: str) -> Iterator[Key]:
    """Every key below a section, depth first.

    A section inside is a key of its own where it departs from what its keys say: one that is
    absent by default, or whose default sets other values than its class.
    """
    for name, field in section.model_fields.items():
        key = f"{prefix}.{field.alias or name}"
        default = field.get_default(call_default_factory=True)
        inner = section_in(field.annotation)
        if isinstance(default, Section):
            default = departures(default)
        if inner is None or default != {}:
            plain = REQUIRED if default is PydanticUndefined else to_jsonable_python(default)
            yield Key(key, plain)
        if inner is not None:
            yield from keys_of(inner, key)


def section_in(annotation: Any) -> type[Section] | None:
    """The section that an annotation names, perhaps optionally; None for anything else."""
    if get_origin(annotation) is dict:
        return None
    options = get_args(annotation) or (annotation,)
    sections = [o for o in options if isinstance(o, type) and issubclass(o, Section)]
    return sections[0] if len(sections) == 1 else None


def recorded_defaults() -> dict[str, Any]:
    """`RECIPE` and the default of every scientific key: what `defaults.json` holds."""
    keys = [
        key
        for prefix, section in SCIENTIFIC.items()
        for key in keys_of(section, prefix)
        if not _is_left_out(key.name, prefix)
    ]
    return {"recipe": RECIPE, "defaults": {key.name: key.default for key in keys}}


def defaults_text(recorded: Mapping[str, Any]) -> str:
    """The new content of `defaults.json`, `recorded` being what it holds.

    Raises `ConfigError` where a recorded default has changed and its stage's recipe has not.
    """
    current = recorded_defaults()
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
    first, second, *_ = key.split(".")
    return second if first == "models" else first


def _is_left_out(key: str, prefix: str) -> bool:
    own = key.removeprefix(f"{prefix}.").split(".")[0]
    return own in NOT_SCIENCE.get(stage_of(f"{prefix}.{own}"), set())
