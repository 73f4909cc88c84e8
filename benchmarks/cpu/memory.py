"""Sizes of this process, in bytes. Without torch, since a process that has not imported it is measured too."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path


def resident() -> int:
    """Memory that the process has in use."""
    return _status("VmRSS")


def peak() -> int:
    """The most it had in use since :func:`reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Begin :func:`peak` anew. Where the system does not allow that, the older peak stays."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(field)
