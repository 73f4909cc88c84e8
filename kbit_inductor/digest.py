"""What tells one set of passes and kernels from another, for the keys of torch's caches.

The rewritten graph is in those keys already, and with it the operators of its kernels. The digest is for what a graph does not
show: an edit of a pass, of a kernel's fake or derivative, or of a function beside them, always leads to a fresh compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kbit_inductor.lowering.registry import Kernel
from kbit_inductor.passes.record import Pass


def digest(records: Iterable[Pass | Kernel]) -> str:
    """A hash of the fields of ``records``, of functions the source; the same in every process."""
    parts = [_described(getattr(each, field.name)) for each in records for field in dataclasses.fields(each)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _described(value: object) -> str:
    return _source(value) if callable(value) else repr(value)


@functools.cache
def _source(function: Callable[..., Any]) -> str:
    """The hash of the files that ``function`` is written in and of its own code, which a function made by another may share."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    content = repr((code.co_code, code.co_names, [c for c in code.co_consts if not inspect.iscode(c)])) if code else ""
    file = inspect.getsourcefile(function if code else type(function))
    if file is not None and Path(file).is_file():
        content += Path(file).read_text(encoding="utf-8")
    content += _package(getattr(function, "__module__", "").partition(".")[0])
    return hashlib.sha256(content.encode()).hexdigest()


@functools.cache
def _package(name: str) -> str:
    """The hash of the Python files of the package of this name; "" of a module that is no package, or has no folder of its own."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or Path(file).name != "__init__.py":
        return ""
    hashed = hashlib.sha256()
    for path in sorted(Path(file).parent.rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()
