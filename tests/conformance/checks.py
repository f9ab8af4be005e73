"""One comparison of a recorded value with ours."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """How far a number may be off: `absolute + relative * |expected|`.

    Elementwise, or with `by_norm` the norm of a tensor's difference against its own norm.
    """

    absolute: float = 0.0
    relative: float = 0.0
    by_norm: bool = False


EXACT = Tolerance()


class Check(NamedTuple):
    """Our value and the recorded one; `part` ends the case's name where its entry has several."""

    actual: Any
    expected: Any
    tolerance: Tolerance = EXACT
    part: str = ""


Checks = Iterator[Check]
Reader = Callable[..., Checks]


def recorded(
    own: Mapping[str, Any], entry: Mapping[str, Any], tolerance: Tolerance = EXACT, part: str = ""
) -> Check:
    """Those of our values that the entry has too; others of the entry stay unread."""
    keys = [key for key in own if key in entry]
    return Check(
        {key: own[key] for key in keys}, {key: entry[key] for key in keys}, tolerance, part
    )


def compare(actual: Any, expected: Any, tolerance: Tolerance = EXACT, what: str = "value") -> str:
    """Why `actual` is not `expected`; empty where it is. Mappings and lists are compared inside."""
    own, other = _elements(actual), _elements(expected)
    if own is not None and other is not None:
        if different := sorted(map(str, {*own} ^ {*other})):
            return f"{what}: on one side only: {', '.join(different)}"
        # All of them: what is compared is read.
        reasons = [compare(own[key], other[key], tolerance, f"{what} {key}") for key in other]
        return next(filter(None, reasons), "")
    numbers, expected_numbers = _numbers(actual), _numbers(expected)
    if numbers is None or expected_numbers is None:
        return "" if actual == expected else f"{what} {_differ(actual, expected)}"
    return _compare_numbers(numbers, expected_numbers, tolerance, what)


def _elements(value: Any) -> Mapping[Any, Any] | None:
    """What is compared one by one: a mapping, or a list that holds more than plain values."""
    if isinstance(value, list) and any(isinstance(e, Mapping | list | Tensor) for e in value):
        return dict(enumerate(value))
    return value if isinstance(value, Mapping) else None


def _numbers(value: Any) -> Tensor | None:
    try:
        return torch.as_tensor(value).double()
    except (TypeError, ValueError, RuntimeError):
        return None


def _compare_numbers(own: Tensor, expected: Tensor, tolerance: Tolerance, what: str) -> str:
    if own.shape != expected.shape:
        return f"{what}: shape {_differ(list(own.shape), list(expected.shape))}"
    finite = expected.isfinite()
    if not torch.equal(own[~finite], expected[~finite]):
        return f"{what}: infinities at other places than recorded"
    own, expected = own[finite], expected[finite]
    error, size = (own - expected).abs(), expected.abs()
    if tolerance.by_norm:
        error, size = error.norm(), size.norm()
    # Written so that a NaN fails.
    if bool((error <= tolerance.absolute + tolerance.relative * size).all()):
        return ""
    if own.numel() == 1:
        return f"{what} is {own.item():.9g}, expected {expected.item():.9g}"
    return f"{what} is off by {error.max().item():.3g}, with values up to {size.max().item():.3g}"


def _differ(actual: Any, expected: Any) -> str:
    own, other = (textwrap.shorten(repr(value), 300) for value in (actual, expected))
    return f"is {own}, expected {other}"
