"""What tells one set of passes from another, for the keys of torch's caches.

The rewritten graph is in those keys already. The digest is for what a graph does not show: an edit of a pass, or of a function
beside it, always leads to a fresh compilation.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kbit_inductor.passes.record import Pass


def digest(passes: Sequence[Pass]) -> str:
    """A hash of the names, places and sources of ``passes``, the same in every process."""
    parts = [f"{each.name} {each.tier} {each.before} {each.after} {_source(each.run)}" for each in passes]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _source(function: Callable[..., Any]) -> str:
    """The hash of the file that ``function`` is written in and of its own code, which a function made by another may share."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    content = repr((code.co_code, code.co_names, [c for c in code.co_consts if not inspect.iscode(c)])) if code else ""
    file = inspect.getsourcefile(function if code else type(function))
    if file is not None and Path(file).is_file():
        content += Path(file).read_text(encoding="utf-8")
    return hashlib.sha256(content.encode()).hexdigest()
