"""One comparison of a recorded value with ours, and the walk from recorded keys to readers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.conformance.recording import Vectors


class Tolerance(NamedTuple):
    """How far a number may be off: `absolute + relative * |expected|`.

    Elementwise, or with `by_norm` the norm of a tensor's difference against its own norm.
    """

    absolute: float = 0.0
    relative: float = 0.0
    by_norm: bool = False


EXACT = Tolerance()


class Check(NamedTuple):
    """One comparison. Those that follow each other with the same `name` are one case.

    `actual` may be the exception that stands in a value's place.
    """

    name: str
    actual: Any
    expected: Any
    tolerance: Tolerance = EXACT
    what: str = ""


Checks = Iterator[Check]
Reader = Callable[..., Checks]
"""`reader(vectors, case's name, content, *groups of the pattern)` reads what a key holds."""


def guarded(name: str, reader: Reader, *arguments: Any) -> Checks:
    """The reader's checks; an error that ends them becomes the case `name`, and others follow."""
    try:
        yield from reader(*arguments)
    except Exception as error:
        yield Check(name, error, None)


def read(vectors: Vectors, name: str, readers: Reader | Mapping[str, Reader]) -> Checks:
    """The checks of a file or folder.

    `readers` goes by paths of keys: patterns for one key each, with `/` between. What no pattern
    fits stays unread. A single reader is given the name alone.
    """
    if callable(readers):
        yield from readers(vectors, name)
        return
    for path, reader in readers.items():
        for case, content, groups in _find(name, vectors.file(name), path.split("/"), ()):
            yield from guarded(case, reader, vectors, case, content, *groups)


def _find(name: str, content: Any, keys: list[str], groups: tuple) -> Iterator[tuple]:
    """Name, content and groups of what lies under the keys; a number on the way is not passed."""
    if not keys or not isinstance(content, (Mapping, list)):
        yield name, content, groups
        return
    for key in content if isinstance(content, Mapping) else range(len(content)):
        if match := re.fullmatch(keys[0], str(key)):
            yield from _find(f"{name}/{key}", content[key], keys[1:], groups + match.groups())


def compare(actual: Any, expected: Any, tolerance: Tolerance = EXACT, what: str = "") -> str:
    """Why `actual` is not `expected`; empty where it is. Mappings and lists are compared inside."""
    reasons = []
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if different := sorted({*actual} ^ {*expected}):
            reasons = [f"{what}: on one side only: {', '.join(map(str, different))}"]
        pairs = [(key, actual[key], expected[key]) for key in expected if key in actual]
    elif isinstance(expected, list) and isinstance(actual, list) and not _is_flat(expected):
        if len(actual) != len(expected):
            reasons = [f"{what}: length {_differ(len(actual), len(expected))}"]
        pairs = [(index, *pair) for index, pair in enumerate(zip(actual, expected, strict=False))]
    else:
        return _compare_values(actual, expected, tolerance, what)
    # All of them: what is compared is read.
    reasons += [compare(own, other, tolerance, f"{what} {key}") for key, own, other in pairs]
    return next(filter(None, reasons), "")


def _is_flat(value: list[Any]) -> bool:
    return not any(isinstance(element, (Mapping, list, Tensor)) for element in value)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_numeric, value))
    return isinstance(value, (bool, int, float, Tensor))


def _compare_values(actual: Any, expected: Any, tolerance: Tolerance, what: str) -> str:
    if tolerance == EXACT or not (_is_numeric(actual) and _is_numeric(expected)):
        own, recorded = (v.tolist() if isinstance(v, Tensor) else v for v in (actual, expected))
        return "" if own == recorded else f"{what} {_differ(own, recorded)}"
    own, recorded = (torch.as_tensor(value).double() for value in (actual, expected))
    if own.shape != recorded.shape:
        return f"{what}: shape {_differ(list(own.shape), list(recorded.shape))}"
    finite = recorded.isfinite()
    if not torch.equal(own[~finite], recorded[~finite]):
        return f"{what}: infinities at other places than recorded"
    own, recorded = own[finite], recorded[finite]
    error, size = (own - recorded).abs(), recorded.abs()
    if tolerance.by_norm:
        error, size = error.norm(), size.norm()
    # Written so that a NaN fails.
    if bool((error <= tolerance.absolute + tolerance.relative * size).all()):
        return ""
    if own.numel() == 1:
        return f"{what} {_differ(own.item(), recorded.item())}"
    return f"{what} is off by {error.max().item():.3g}, with values up to {size.max().item():.3g}"


def _differ(actual: Any, expected: Any) -> str:
    own, recorded = (textwrap.shorten(repr(value), 300) for value in (actual, expected))
    return f"is {own}, expected {recorded}"
