"""Cases of `icot/`."""

from __future__ import annotations

INFORMATION: set[str] = set()
READERS: dict = {}
