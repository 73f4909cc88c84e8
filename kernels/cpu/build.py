"""Builds the C++ kernels on first use and loads them, so that ``torch.ops.kbit.*_cpu`` have an implementation.

The library is compiled for this very machine (``-march=native``) and kept in a cache directory. Its file name carries
the key of everything that went into it and a digest of its bytes: a stale or truncated file is never loaded.

Environment:
    CXX: the compiler, arguments allowed (default ``g++``).
    KBIT_CACHE_DIR: where libraries are kept (default ``$XDG_CACHE_HOME/kbit_inductor`` or ``~/.cache/kbit_inductor``).

When it runs, the library picks the best instruction set that it has kernels for; ``KBIT_ISA`` names one instead (``portable``,
``avx2``, ``avx512``, ``avx512vnni``).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_lock = threading.Lock()
_SHOWN_LINES = 20
# Beside the flags of all. Quantizing has to round as PyTorch does, a product before it is added to.
_UNIT_FLAGS = {
    "quantize.cpp": ["-ffp-contract=off"],
    "activations.cpp": ["-fno-math-errno", "-fno-trapping-math"],  # so that rounding is a vector instruction
}
# Each is compiled for an instruction set of its own, whatever this machine has: which one runs is decided when it does.
_ISA_FLAGS = {
    "dot_avx2.cpp": ["-march=x86-64-v3"],
    "dot_avx512.cpp": ["-march=x86-64-v4"],
    "bit_avx2.cpp": ["-march=x86-64-v3"],
    "bit_avx512.cpp": ["-march=x86-64-v4", "-mavx512vpopcntdq"],
    "dot_avx512vnni.cpp": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi", "-mgfni"],
}


class CpuBuildError(RuntimeError):
    """The CPU kernels could not be built; the message says why and what mends it."""


def load() -> None:
    """Build the kernels if no valid build is cached, and load them. Later calls, from any thread, do nothing.

    Raises:
        CpuBuildError: no compiler, a failed compilation, a cache directory that cannot be written, or a library that
            does not load.
    """
    with _lock:
        _load_once()


@functools.cache
def _load_once() -> None:
    library = build()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise CpuBuildError(f"the compiled CPU kernels do not load: {error}\nDelete {library} and retry.") from error


def build() -> Path:
    """Path of the shared library for this machine, from the cache or freshly built."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    native = _native_flags(compiler)
    flags = [*_compile_flags(), *native]
    key = _cache_key(compiler, flags)
    return _cached(key) or _compile(compiler, flags, key)


def sources() -> list[Path]:
    """The C++ files that ship with the package, headers included, in a fixed order."""
    folder = Path(__file__).parent
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])


def cache_dir() -> Path:
    """The directory that holds built libraries."""
    if chosen := os.environ.get("KBIT_CACHE_DIR"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kbit_inductor"


def _native_flags(compiler: list[str]) -> list[str]:
    flag = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [flag] if _macros(compiler, flag) is not None else []


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _macros(compiler: list[str], *flags: str) -> str | None:
    """Every predefined macro of the compiler: its version and, under ``-march=native``, what this CPU can do.

    ``None`` if the compiler refuses the flags.
    """
    command = [*compiler, *flags, "-x", "c++", "-dM", "-E", os.devnull]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CpuBuildError(
            f"no C++ compiler: cannot run {shlex.join(compiler)} ({error.strerror}).\n"
            "Install g++ (Debian, Ubuntu: apt install g++) or set the environment variable CXX to a C++ compiler."
        ) from error
    return result.stdout if result.returncode == 0 else None


def _compile_flags() -> list[str]:
    # Not -ffast-math, which assumes that there are no NaNs: fused multiply-add is all we want of it.
    return [
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-fopenmp",  # at::parallel_for is a template: without it, it runs on one thread
        "-ffp-contract=fast",
        "-fvisibility=hidden",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]


def _torch_dir() -> Path:
    return Path(torch.__file__).parent


def _cache_key(compiler: list[str], flags: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (
        torch.__version__,
        str(_torch_dir()),
        *compiler,
        *flags,
        str(_UNIT_FLAGS),
        str(_ISA_FLAGS),
        str(_macros(compiler, *flags)),
    ):
        digest.update(part.encode() + b"\0")
    for source in sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _cached(key: str) -> Path | None:
    for library in sorted(cache_dir().glob(f"kbit_cpu-{key}-*.so")):
        if library.stem.rpartition("-")[2] == _file_digest(library):
            return library
    return None


def _compile(compiler: list[str], flags: list[str], key: str) -> Path:
    """Build in a directory of our own, then move into the cache in one step, so that two processes may race."""
    directory = cache_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
            built = _build_in(Path(scratch), compiler, flags)
            library = directory / f"kbit_cpu-{key}-{_file_digest(built)}.so"
            built.replace(library)
    except OSError as error:
        raise CpuBuildError(
            f"cannot write the compiled CPU kernels to {directory}: {error.strerror}.\n"
            "Make room there, or set the environment variable KBIT_CACHE_DIR to a directory that can be written."
        ) from error
    return library


def _build_in(scratch: Path, compiler: list[str], flags: list[str]) -> Path:
    headers = [_torch_dir() / "include", _torch_dir() / "include/torch/csrc/api/include"]
    include = [argument for folder in headers for argument in ("-isystem", str(folder))]
    units = [source for source in sources() if source.suffix == ".cpp"]
    objects = [scratch / f"{unit.stem}.o" for unit in units]

    def compile_unit(unit: Path, target: Path) -> None:
        extra = [*_UNIT_FLAGS.get(unit.name, []), *(_ISA_FLAGS.get(unit.name, []) if _is_x86() else [])]
        _run([*compiler, *flags, *extra, *include, "-c", str(unit), "-o", str(target)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, units, objects))

    library = scratch / "kbit_cpu.so"
    torch_libraries = [f"-L{_torch_dir() / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*compiler, *flags, "-shared", *map(str, objects), *torch_libraries, "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if os.strerror(errno.ENOSPC) in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if result.returncode:
        shown = "\n".join(result.stderr.splitlines()[:_SHOWN_LINES])
        raise CpuBuildError(
            f"compiling the CPU kernels failed:\n{shlex.join(command)}\n{shown}\n"
            "A compiler with C++20 (g++ 11 or clang 14 and later) is needed; the environment variable CXX selects one."
        )
