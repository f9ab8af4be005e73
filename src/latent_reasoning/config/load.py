"""From YAML files to a checked `Experiment` and back, and the messages about mistakes."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from latent_reasoning.config.entries import ENTRIES, WITH_MODEL
from latent_reasoning.config.experiment import Experiment
from latent_reasoning.config.fields import ConfigError, Section, fields_of, section_in


def load(files: str | Path | list[str | Path]) -> Experiment:
    """Read one or more YAML files, later ones over earlier ones, into a checked `Experiment`.

    Raises `ConfigError` naming the file, the key and what is allowed.
    """
    files = [files] if isinstance(files, str | Path) else files
    return resolve(read(files), ", ".join(str(file) for file in files))


def read(files: Sequence[str | Path]) -> dict[str, Any]:
    """The unchecked content of YAML files, later ones merged over earlier ones."""
    merged: dict[str, Any] = {}
    for file in files:
        merged = merge(merged, _read(Path(file)))
    return merged


def resolve(raw: dict[str, Any], file: str) -> Experiment:
    """Check a configuration given as a mapping; `file` names it in errors."""
    filled = _with_stage_defaults(copy.deepcopy(raw), file)
    try:
        return Experiment.model_validate(filled)
    except ValidationError as error:
        raise ConfigError(_explain(error, raw, file)) from None


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings deeply; `above` takes precedence, and replaces lists and scalars."""
    out = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def dump(experiment: Experiment) -> dict[str, Any]:
    """The full configuration with every default, as plain values under the keys of a file."""
    return experiment.model_dump(mode="json", by_alias=True)


def dump_yaml(experiment: Experiment) -> str:
    """`dump` as YAML text, loadable by `load`."""
    return yaml.dump(
        dump(experiment), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


class _Dumper(yaml.SafeDumper):
    """Safe YAML that escapes U+0085, which would be written as it is and read as a line break."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = '"' if "\x85" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge")
"""What a configuration may hold; a date, bytes or a set would come back as text from a dump."""


OTHER_BASES = re.compile(r"[-+]?0[0-7_]+|.*:.*")
"""Numbers that YAML 1.1 does not read as they stand: 010 is 8 and 1:30 is 90."""


class _Loader(yaml.SafeLoader):
    """Safe YAML of plain values that refuses a repeated key, a key that is not text, and numbers
    that YAML reads as octal or sexagesimal."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError) as error:  # of thousands of digits, or with a tag it belies
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value!s:.80} is no {node.tag.rpartition(':')[2]}: {error}",
                problem_mark=node.start_mark,
            ) from None
        if isinstance(value, int | float) and OTHER_BASES.fullmatch(str(node.value)):
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value} is no whole number: YAML would read {value}; write it "
                "without a leading 0 or a colon, or text in quotes",
                problem_mark=node.start_mark,
            )
        infinite = isinstance(value, float) and not math.isfinite(value)
        half_character = isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value)
        if node.tag.rpartition(":")[2] not in PLAIN_TAGS or infinite or half_character:
            raise yaml.constructor.ConstructorError(
                problem=f"{value!r:.80} is neither text nor a finite number, true, false, null, "
                "a list or a mapping: write a date in quotes",
                problem_mark=node.start_mark,
            )
        return value

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:  # as written: a merge (`<<`) later puts others before them
            key = key_node.value
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!s:.80} is not text: write it in quotes",
                    problem_mark=key_node.start_mark,
                )
            if isinstance(key, str) and key_node.tag != "tag:yaml.org,2002:merge" and key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return node


def plain_value(text: str) -> Any:
    """The number, true, false or null that a file means by a text without quotes, else the text.

    An empty text is one.
    """
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False)) if text else "tag:yaml.org,2002:str"
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except yaml.constructor.ConstructorError:  # what a file may not hold, such as a date
        return text


def _read(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problem = f"holds the character {chr(error.character)!r}, which YAML does not allow"
        raise ConfigError(f"{path}: line {line} {problem}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError(f"{path}:{where} {problem}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys, not {content!r:.80}")
    return content


def _with_stage_defaults(raw: dict[str, Any], file: str) -> dict[str, Any]:
    """Fill each entry of `models` from `stages` and, where it makes a latent reasoner, `model`."""
    models = raw.get("models")
    stages = raw.get("stages") or {}
    if not isinstance(models, dict) or not isinstance(stages, dict):
        return raw
    filled: dict[str, Any] = {}
    for name, entry in models.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"{file}: models.{name}: a model is a mapping, not {entry!r:.60}")
        stage = entry.get("stage")
        defaults = stages.get(stage) if isinstance(stage, str) else None
        entry = merge(defaults if isinstance(defaults, dict) else {}, entry)
        if stage in WITH_MODEL and isinstance(raw.get("model"), dict):
            own = entry.get("model", {})
            entry["model"] = merge(raw["model"], own) if isinstance(own, dict) else own
        filled[name] = entry
    return {**raw, "models": filled}


# -------------------------------------------------------------------------------------- errors


def _explain(error: ValidationError, raw: dict[str, Any], file: str) -> str:
    """One line for each problem: file, key, what is wrong, what is allowed."""
    lines = []
    for problem in error.errors():
        location = _written_at(problem["loc"], raw)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            if location[0] == "stages" and len(location) == 3:
                continue  # `Stages` says it
            message = _unknown_key(_section_at(problem["loc"][:-1]), location[-1])
        elif problem["type"] == "missing":
            message = "is required"
        elif "input" in problem and not isinstance(problem["input"], dict | BaseModel):
            message = f"{message}, not {problem['input']!r:.80}"
        key = ".".join(str(part) for part in location)
        lines.append(f"{file}: {key}: {message}" if key else f"{file}: {message}")
    return "\n".join(dict.fromkeys(lines))


def _written_at(location: tuple[int | str, ...], raw: dict[str, Any]) -> list[int | str]:
    """Where the file has what is at a location of pydantic's: many models may have it from one
    place, their stage's defaults or the section `model`."""
    if len(location) < 3 or location[0] != "models" or location[2] not in ENTRIES:
        return list(location)
    _, name, stage, *path = location
    places: list[list[int | str]] = [["models", name, *path], ["stages", stage, *path]]
    if path[:1] == ["model"]:
        places.append(path)
    return next((place for place in places if _holds(raw, place)), places[0])


def _holds(value: Any, place: list[int | str]) -> bool:
    for part in place:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _unknown_key(section: type[Section], key: int | str) -> str:
    allowed = ", ".join(sorted(name for name, _, _ in fields_of(section)))
    return section.REMOVED.get(str(key), f"unknown key; allowed here: {allowed}")


def _section_at(location: tuple[int | str, ...]) -> type[Section]:
    """The section at a location of pydantic's, in which a model's stage follows its name."""
    section: type[Section] = Experiment
    parts = iter(location)
    for part in parts:
        annotation = next(f.annotation for key, _, f in fields_of(section) if key == part)
        if get_origin(annotation) is dict:
            next(parts)
            annotation = get_args(annotation)[1]
        section = section_in(annotation) or ENTRIES[str(next(parts))]
    return section


# -------------------------------------------------------------------------------------- schema


def schema_of_experiment() -> dict[str, Any]:
    """The JSON schema of a resolved configuration (`workflow/schemas/config.schema.json`)."""
    return Experiment.model_json_schema(by_alias=True)
