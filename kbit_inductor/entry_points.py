"""What other packages add by entry points."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any


@functools.cache
def load(group: str) -> tuple[tuple[str, Any], ...]:
    """``(what it is called in messages, object)`` of every entry point of ``group``, sorted by name; read once per process."""
    found = sorted(entry_points(group=group), key=lambda point: (point.name, point.value))
    return tuple((f"the entry point {point.name!r} of {group!r} ({point.value})", point.load()) for point in found)
