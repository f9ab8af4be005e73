"""What sections are made of: types of values, marks on keys, errors, paths and digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

PROJECT_ROOT = Path(__file__).resolve().parents[3]
"""The folder that holds the Snakefile; relative paths of a configuration start there."""


class UserError(Exception):
    """An error that a user can mend: its message says in one line what, where and what to do."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message names file, key and what is allowed."""


class Section(BaseModel):
    """A mapping of the configuration: unknown keys are refused, and no value changes its type.

    The text below a key is its description, in the schema and in `config/README.md`.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    REMOVED: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, each with what to do about a file that still has it."""


# -------------------------------------------------------------------------------------- types

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
DatasetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


def _with_exponent(value: Any) -> Any:
    """Read `1e-4` as a number: YAML 1.1 takes it for text, since its mantissa has no point."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value


Number = Annotated[float, BeforeValidator(_with_exponent)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_with_exponent)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_with_exponent)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1), BeforeValidator(_with_exponent)]
ShareBetween = Annotated[float, Field(gt=0, lt=1), BeforeValidator(_with_exponent)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_with_exponent)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_with_exponent)]


def _distinct(values: list[Any]) -> list[Any]:
    """The same list; a value that stands twice would count twice in tables."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} stands twice")
    return values


DISTINCT = AfterValidator(_distinct)
"""Refuses a list in which a value stands twice."""


# ------------------------------------------------------------------------------ marks on keys


@dataclass(frozen=True)
class ScienceFor:
    """The stages whose results depend on a key, and on the keys below it.

    A key without this mark is science for the stage that its section belongs to (dag/digests.py).
    """

    stages: frozenset[str]


@dataclass(frozen=True)
class OnlyWhen:
    """A key counts only while another key of its section has one of these values."""

    key: str
    values: frozenset[str]


@dataclass(frozen=True)
class Important:
    """A key to look at first; `config/README.md` marks it with a star."""


def science_for(*stages: str) -> ScienceFor:
    """Mark a key that other stages read than its section's own."""
    return ScienceFor(frozenset(stages))


def only_when(key: str, *values: str) -> OnlyWhen:
    """Mark a key that is meaningless for some values of another key."""
    return OnlyWhen(key, frozenset(values))


NOT_SCIENCE = science_for()
"""Marks a key that changes no result: files count by their content (dag/fingerprints.py)."""
IMPORTANT = Important()


def stages_of(field: FieldInfo, section_stages: frozenset[str]) -> frozenset[str]:
    """The stages that a key is science for; `section_stages` are those of its section."""
    marks = [mark for mark in field.metadata if isinstance(mark, ScienceFor)]
    return marks[0].stages if marks else section_stages


def counts_in(field: FieldInfo, section: Section) -> bool:
    """Whether a key has any effect, given the other values of its section."""
    conditions = [mark for mark in field.metadata if isinstance(mark, OnlyWhen)]
    return all(getattr(section, mark.key) in mark.values for mark in conditions)


def is_important(field: FieldInfo) -> bool:
    """Whether a key is marked as one of those to look at first."""
    return IMPORTANT in field.metadata


def fields_of(section: type[Section]) -> Iterator[tuple[str, str, FieldInfo]]:
    """Each key of a section as files write it, the name of its attribute and its definition."""
    for name, field in section.model_fields.items():
        yield field.alias or name, name, field


def section_in(annotation: Any) -> type[Section] | None:
    """The section in an annotation, which may be optional; None for any other annotation."""
    if get_origin(annotation) is dict:
        return None
    options = get_args(annotation) or (annotation,)
    sections = [o for o in options if isinstance(o, type) and issubclass(o, Section)]
    return sections[0] if len(sections) == 1 else None


# -------------------------------------------------------------------------------------- paths


def expand_path(text: str) -> Path:
    """A path of the configuration, its `${VARIABLE}` filled in, relative to the project root.

    Raises `ConfigError` if a variable is not set, or `~` names nobody.
    """
    missing = [name for name in re.findall(r"\$\{(\w+)\}", text) if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the path {text!r} needs the environment variable {missing[0]}, which is not set"
        )
    path = Path(re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], text))
    try:
        return PROJECT_ROOT / path.expanduser()
    except RuntimeError:
        raise ConfigError(f"the path {text!r} begins with the home of nobody known here") from None


def is_local(path: str) -> bool:
    """Whether an imported model's `path` is a folder (existing or not) rather than a hub id."""
    written_as_a_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or "$" in path
    return written_as_a_path or expand_path(path).is_dir()


def check_source(source: str, path: str | None, hub_id: str | None) -> None:
    """Raise `ValueError` where a section's `source` lacks the key that says what is read."""
    if source in ("local", "gguf") and not path:
        raise ValueError(f"source: {source} needs path")
    if source == "hub" and not hub_id:
        raise ValueError("source: hub needs hub_id (or source: local with path)")


# -------------------------------------------------------------------------------------- digests


def canonical(value: Any) -> str:
    """Sorted, compact JSON: equal content gives equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]
