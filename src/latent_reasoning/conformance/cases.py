"""What one conformance case is; every area's module yields these and knows nothing of printing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Skip(Exception):  # noqa: N818 (a verdict, not an error)
    """Raised by a case that cannot be replayed here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One fact to replay.

    `name` is `folder/file-or-key/..`. `run` takes no argument, returns nothing, and raises
    `AssertionError` or `ValueError` (why it failed) or `Skip`.
    """

    name: str
    run: Callable[[], None]


def check_known(settings: dict[str, Any], known: set[str], where: str) -> None:
    """Refuse settings that are not understood, so that nothing is silently left uncompared.

    Raises:
        ValueError: naming the unknown keys and the known ones.
    """
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(
            f"{where}: not understood: {', '.join(unknown)} (known: {', '.join(sorted(known))})"
        )


def check_equal(actual: Any, expected: Any, what: str) -> None:
    """Exact comparison with both values in the message.

    Raises:
        AssertionError: where they differ.
    """
    if actual != expected:
        raise AssertionError(f"{what} is {actual!r}, expected {expected!r}")
