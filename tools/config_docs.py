"""What is generated from the typed configuration: the JSON schema, the record of the scientific
defaults and the tables of `config/README.md`.

python -m tools.config_docs            write the files
python -m tools.config_docs --check    fail if a file on disk is not current
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from latent_reasoning.config import (
    ENTRIES,
    PROJECT_ROOT,
    ConfigError,
    Experiment,
    Section,
    schema_of_experiment,
)
from latent_reasoning.config.fields import fields_of, is_important, section_in
from latent_reasoning.dag.digests import defaults_text

SCHEMA = PROJECT_ROOT / "workflow" / "schemas" / "config.schema.json"
DEFAULTS = PROJECT_ROOT / "workflow" / "schemas" / "defaults.json"
README = PROJECT_ROOT / "config" / "README.md"
PAPER = PROJECT_ROOT / "config" / "paper.yaml"
BEGIN = "<!-- tables: written by `make docs`, do not edit below -->"
END = "<!-- end of the tables -->"
TAGS = ("paper", "code", "trl", "ours")


def schema_text() -> str:
    """The schema file's content."""
    return json.dumps(schema_of_experiment(), indent=2, ensure_ascii=False) + "\n"


def with_tables(path: Path, made: str) -> str:
    """A file's text with `made` between the markers.

    Raises `ValueError` if the file lacks the markers.
    """
    before, begin, rest = _read(path).partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path.name} lacks the line {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def tables() -> str:
    """A heading and a table for each section, in the order of the configuration.

    A section that occurs in several places has one table, headed by all their names. A star marks
    the keys to look at first; `source` says where the value in `config/paper.yaml` comes from.
    """
    sources = sources_of_values(_read(PAPER))
    titles: dict[type[BaseModel], list[str]] = {Experiment: ["Top level"]}
    for name, section in _sections(Experiment, ""):
        titles.setdefault(section, []).append(f"`{name}`")
    for stage, entry in ENTRIES.items():
        titles[entry] = [f"`models.NAME` with `stage: {stage}`"]
        for name, section in _sections(entry, "models.NAME."):
            if f"`{name}`" not in titles.setdefault(section, []):
                titles[section].append(f"`{name}`")
    return "\n".join(_table(names, section, sources) for section, names in titles.items())


def sources_of_values(text: str) -> dict[str, set[str]]:
    """The tags of `paper.yaml`'s values (`paper`, `code`, `trl`, `ours`), by key.

    Keys have the names of the tables: a model's begin with `models.NAME`, whatever its stage. A tag
    holds for every key that begins on its line.
    """
    lines = text.splitlines()
    found: dict[str, set[str]] = {}

    def visit(node: yaml.Node, path: tuple[str, ...]) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            below = (*path, key.value)
            if below[0] in ("stages", "models") and len(below) == 3:
                below = ("models", "NAME", below[2])
            tag = re.search(r"# \[(\w+)\]", lines[key.start_mark.line])
            if tag and key.value != "<<":
                found.setdefault(".".join(below), set()).add(tag[1])
            visit(value, below)

    visit(yaml.compose(text, yaml.SafeLoader), ())
    return found


def _sections(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Sections below a section, depth first, with their dotted names."""
    for key, field in section.model_fields.items():
        name = f"{prefix}{field.alias or key}"
        annotation = field.annotation
        if get_origin(annotation) is dict:
            annotation, name = get_args(annotation)[1], f"{name}.NAME"
        inner = section_in(annotation)
        if inner is not None:
            yield name, inner
            yield from _sections(inner, f"{name}.")


def _table(titles: list[str], section: type[Section], sources: dict[str, set[str]]) -> str:
    schema = section.model_json_schema(by_alias=True)
    properties = schema["properties"]
    lines = [f"### {', '.join(titles)}", "", inspect.cleandoc(section.__doc__ or ""), ""]
    lines += ["| key | allowed | default | source | meaning |", "|---|---|---|---|---|"]
    prefixes = ["", *(title.split("`")[1] + "." for title in titles if title.startswith("`"))]
    for key, _, field in fields_of(section):
        allowed = _allowed(properties[key], schema.get("$defs", {}))
        default = _default(field.default, field.default_factory, field.is_required())
        tags = set().union(*(sources.get(prefix + key, set()) for prefix in prefixes))
        untold = "" if section_in(field.annotation) else TAGS[-1]
        source = ", ".join(tag for tag in TAGS if tag in tags) or untold
        meaning = " ".join((field.description or "").split())
        star = " ★" if is_important(field) else ""
        cells = [f"`{key}`{star}", allowed, default, source, meaning]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _default(value: Any, factory: Any, required: bool) -> str:
    if required:
        return "(required)"
    if value is PydanticUndefined:
        value = factory()
    if isinstance(value, BaseModel):
        departures = value.model_dump(exclude_defaults=True)
        return f"`{_yaml(departures)}`, the rest as below" if departures else "as below"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A value as it is written in a YAML file, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    return value if isinstance(value, str) and value.strip() == value else json.dumps(value)


NAMES = {"integer": "whole number", "number": "number", "boolean": "true, false"}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _allowed(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What the JSON schema allows, in words."""
    if "$ref" in schema:
        return "section"
    if "anyOf" in schema:
        return " or ".join(_allowed(option, definitions) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type")
    if kind == "null":
        return "null"
    if kind == "array":
        return _allowed_list(schema, definitions)
    if kind == "object":
        values = schema.get("additionalProperties") or next(
            iter(schema.get("patternProperties", {}).values()), {}
        )
        if not isinstance(values, dict) or not (set(values) & {"type", "anyOf", "enum"}):
            return "mapping"
        return f"mapping of names to {_allowed(values, definitions)}"
    if kind == "string":
        return "text" if "pattern" not in schema else f"text like `{schema['pattern']}`"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([NAMES.get(kind, str(kind)), ", ".join(bounds)]).strip()


def _allowed_list(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    items = schema.get("prefixItems")
    if items:
        return f"list of {len(items)}: {_allowed(items[0], definitions)}"
    return f"list of {_allowed(schema['items'], definitions)}"


def wanted_files() -> dict[Path, str]:
    """Every generated file as it should be.

    Raises `ConfigError` if a scientific default changed without a new recipe (`dag/digests.py`).
    """
    return {
        SCHEMA: schema_text(),
        DEFAULTS: defaults_text(json.loads(_read(DEFAULTS) or "{}")),
        README: with_tables(README, tables()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with `--check` report those that are not current."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--check", action="store_true", help="write nothing; fail if not current")
    check = options.parse_args(arguments).check
    try:
        wanted = wanted_files()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if _read(path) != text]
    for path in stale:
        if check:
            print(f"error: {path.name} is not current: run make docs", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if stale and check else 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
