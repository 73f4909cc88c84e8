"""Finds the compiled library or builds it, and loads it, so that ``torch.ops.kbit.*_cpu`` have an implementation.

One library serves every machine of an architecture (:mod:`.compiler`). It is looked for beside this file, where a wheel may have
brought it, then in a cache directory, and built there if it is in neither. A file's name carries the stamp of what it was made of
and a digest of its bytes: one that is stale or truncated is never loaded.

Environment:
    KBIT_CACHE_DIR: where libraries are kept (default ``$XDG_CACHE_HOME/kbit_inductor`` or ``~/.cache/kbit_inductor``).
    CXX: the compiler, arguments allowed (default ``g++``).

When it runs, the library picks the best instruction set that this machine has; ``KBIT_ISA`` names another one
(:data:`.compiler.INSTRUCTION_SETS`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kbit_inductor.kernels.cpu import compiler
from kbit_inductor.kernels.cpu.compiler import CpuBuildError

_lock = threading.Lock()


def load() -> None:
    """Load the kernels, built first where no library fits. Later calls, from any thread, do nothing.

    Raises:
        CpuBuildError: no library and no compiler, a failed compilation, a cache directory that cannot be written, or a library
            that does not load when it has just been built.
    """
    with _lock:
        _load_once()


@functools.cache
def _load_once() -> None:
    stamp = compiler.stamp(compiler.sources())
    if _is_loaded(stamp):
        return
    broken: list[Path] = []  # say, built where the C++ runtime is newer
    for library in _ready(stamp):
        with contextlib.suppress(OSError):
            torch.ops.load_library(library)
            return
        broken.append(library)
    library = build(broken)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise CpuBuildError(f"the compiled CPU kernels do not load: {error}\nDelete {library} and retry.") from error


def build(broken: Sequence[Path] = ()) -> Path:
    """A library that fits and is not among ``broken``: the wheel's, a cached one, or one built now, one process at a time.

    Raises:
        CpuBuildError: as :func:`load`, but for loading.
    """
    stamp = compiler.stamp(compiler.sources())

    def found() -> Path | None:
        return next((library for library in _ready(stamp) if library not in broken), None)

    if library := found():
        return library
    directory = cache_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _one_process(directory):
            return found() or _compile(directory, stamp)  # another one may have built it meanwhile
    except OSError as error:
        raise CpuBuildError(
            f"cannot write the compiled CPU kernels to {directory}: {error.strerror}.\n"
            "Make room there, or set the environment variable KBIT_CACHE_DIR to a directory that can be written."
        ) from error


def cache_dir() -> Path:
    """The directory that holds built libraries."""
    if chosen := os.environ.get("KBIT_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kbit_inductor"


def wheel_dir() -> Path:
    """The directory where a wheel with a library in it has put that (``setup.py``)."""
    return Path(__file__).parent


def _is_loaded(stamp: str) -> bool:
    """Whether an exported package in this process has brought the same library, whose operators are there then."""
    try:
        ctypes.CDLL(compiler.loaded_name(stamp), mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _ready(stamp: str) -> Iterator[Path]:
    for directory in (wheel_dir(), cache_dir()):
        for library in sorted(directory.glob(f"kbit_cpu-{stamp}-*.so")):
            with contextlib.suppress(OSError):  # another process may replace it just now
                if library.name == compiler.library_name(stamp, library):
                    yield library


@contextlib.contextmanager
def _one_process(directory: Path) -> Iterator[None]:
    """Holds the directory's lock, which goes with the process at the latest."""
    with (directory / "lock").open("w") as file:
        with contextlib.suppress(OSError):  # network file systems without locks: then both build, and the last one's stays
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(directory: Path, stamp: str) -> Path:
    """Build in a directory of our own and move into ``directory`` in one step, in place of others with that stamp."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
        built = compiler.compile_library(compiler.sources(), Path(scratch))
        library = directory / compiler.library_name(stamp, built)
        built.replace(library)
    for other in directory.glob(f"kbit_cpu-{stamp}-*.so"):
        if other != library:
            other.unlink(missing_ok=True)
    return library
