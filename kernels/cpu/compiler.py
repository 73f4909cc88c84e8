"""How C++ sources become one library for every machine of an architecture.

:data:`INSTRUCTION_SETS` and :data:`UNITS` say which source is compiled for which instruction sets. A source that is not in
:data:`UNITS` is compiled once, with what every machine of the architecture has. Which instruction set runs is decided when the
library does (``isa.cpp``).

A source compiled for several instruction sets puts its names into the namespace ``KBIT_LEVEL`` (``level.h``). Inline functions of
others, such as the standard library's, are in several objects all the same, and the linker keeps the first copy: so the objects
are linked from the least instruction set to the greatest, and no copy is above the code that calls it.

Environment:
    CXX: the compiler, arguments allowed (default ``g++``).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

_SHOWN_LINES = 20
# Flags of each instruction set, by architecture. Every set holds what the ones before it hold, but for avxvnni: its source has no
# inline function that others could call (tests/test_cpu_build.py).
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "portable": ("-march=x86-64",),
        "avx2": ("-march=x86-64-v3",),
        "avxvnni": ("-march=x86-64-v3", "-mavxvnni"),
        "avx512": ("-march=x86-64-v4",),
        "avx512vnni": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi", "-mavx512vpopcntdq", "-mgfni"),
    },
    "aarch64": {
        "portable": ("-march=armv8-a",),
        "neon": ("-march=armv8.2-a+dotprod",),
    },
}
_OTHER_NAMES = {"AMD64": "x86_64", "arm64": "aarch64"}
_ANY_MACHINE: dict[str, tuple[str, ...]] = {"portable": ()}  # of an architecture that is not in the table


@dataclass(frozen=True)
class Unit:
    """How one source is compiled.

    Attributes:
        sets: the instruction sets, by their keys in :data:`INSTRUCTION_SETS`; those of other architectures are left out.
        flags: beside those of the instruction set and those of all.
    """

    sets: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


# Steps of vector length, for loops that the compiler vectorizes. An architecture has some of them.
LEVELS = ("portable", "avx2", "avx512")
UNITS = {
    # Rounding is a vector instruction, and the same on every instruction set: a product is rounded before it is added to.
    "activations.cpp": Unit(LEVELS, ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")),
    "append.cpp": Unit(LEVELS),
    "attention.cpp": Unit(LEVELS),
    "flash_attention.cpp": Unit(LEVELS),
    "chain.cpp": Unit(LEVELS),
    "kernels.cpp": Unit(LEVELS),
    # Quantizing has to round as PyTorch does, a product before it is added to.
    "quantize.cpp": Unit(LEVELS, ("-ffp-contract=off",)),
    "runs.cpp": Unit(LEVELS),
    "tiled_linear.cpp": Unit(LEVELS),
    "bit_avx2.cpp": Unit(("avx2",)),
    "bit_avx512.cpp": Unit(("avx512vnni",)),
    "dot_avx2.cpp": Unit(("avx2",)),
    "dot_avxvnni.cpp": Unit(("avxvnni",)),
    "dot_avx512.cpp": Unit(("avx512",)),
    "dot_avx512vnni.cpp": Unit(("avx512vnni",)),
    "dot_neon.cpp": Unit(("neon",)),
}


class CpuBuildError(RuntimeError):
    """The CPU kernels could not be built; the message says why and what mends it."""


@dataclass(frozen=True)
class Job:
    """One source compiled for one instruction set."""

    source: Path
    level: str
    flags: tuple[str, ...]


def instruction_sets() -> dict[str, tuple[str, ...]]:
    """The instruction sets of this machine's architecture with their flags, least first."""
    machine = platform.machine()
    return INSTRUCTION_SETS.get(_OTHER_NAMES.get(machine, machine), _ANY_MACHINE)


def sources() -> list[Path]:
    """The C++ files that ship with the package, headers included, in a fixed order."""
    folder = Path(__file__).parent
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])


def jobs(files: Sequence[Path]) -> list[Job]:
    """What is compiled of ``files`` on this architecture, in the order of linking."""
    return list(_jobs([file for file in files if file.suffix == ".cpp"]))


def _jobs(units: Sequence[Path]) -> Iterator[Job]:
    sets = instruction_sets()
    for unit in units:
        if unit.name not in UNITS:
            yield Job(unit, "any", sets["portable"])
    for name, flags in sets.items():
        for unit in units:
            if name in UNITS.get(unit.name, Unit()).sets:
                yield Job(unit, name, (*flags, *UNITS[unit.name].flags))


def stamp(files: Sequence[Path]) -> str:
    """A hash of all that the library's content follows from: sources, flags and torch.

    Of the compiler only the arguments count: any one gives a library that can be used, and none is needed to look for one.
    """
    digest = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), *_command()[1:], *_common_flags(), *_link_flags()):
        digest.update(part.encode() + b"\0")
    for job in jobs(files):
        digest.update(repr((job.source.name, job.level, job.flags)).encode() + b"\0")
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def library_name(stamp: str, library: Path) -> str:
    """The name under which ``library`` is kept: with its stamp and a digest of its bytes."""
    return f"kbit_cpu-{stamp}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def loaded_name(stamp: str) -> str:
    """The name that the dynamic linker knows a loaded library by (its SONAME), and that exported packages ask for."""
    return f"libkbit.so.{stamp}"


def compile_library(files: Sequence[Path], scratch: Path) -> Path:
    """Compile and link ``files`` in the directory ``scratch``; the path of the library there.

    Raises:
        CpuBuildError: no compiler, or one that refuses its flags or a source.
        OSError: no space left in ``scratch``.
    """
    headers = [_torch_dir() / "include", _torch_dir() / "include/torch/csrc/api/include"]
    include = [argument for folder in headers for argument in ("-isystem", str(folder))]
    work = jobs(files)
    objects = [str(scratch / f"{job.source.stem}.{job.level}.o") for job in work]

    def compile_unit(job: Job, target: str) -> None:
        flags = [*_common_flags(), *job.flags, f"-DKBIT_LEVEL={job.level}"]
        _run([*_command(), *flags, *include, "-c", str(job.source), "-o", target])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_unit, work, objects))
    library = scratch / "kbit_cpu.so"
    name = f"-Wl,-soname,{loaded_name(stamp(files))}"
    _run([*_command(), *_common_flags(), *objects, f"-L{_torch_dir() / 'lib'}", *_link_flags(), name, "-o", str(library)])
    return library


def _command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _common_flags() -> list[str]:
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


def _link_flags() -> list[str]:
    # nodelete: an exported package that is closed must not take away the operators, nor what frees packed memory.
    return ["-shared", "-Wl,--no-undefined", "-Wl,-z,nodelete", "-ltorch", "-ltorch_cpu", "-lc10"]


@functools.cache
def _torch_dir() -> Path:
    return Path(torch.__file__).parent


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CpuBuildError(
            f"no C++ compiler: cannot run {command[0]} ({error.strerror}).\n"
            "Install g++ (Debian, Ubuntu: apt install g++) or set the environment variable CXX to a C++ compiler."
        ) from error
    if os.strerror(errno.ENOSPC) in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if result.returncode:
        shown = "\n".join(result.stderr.splitlines()[:_SHOWN_LINES])
        raise CpuBuildError(
            f"compiling the CPU kernels failed:\n{shlex.join(command)}\n{shown}\n"
            "A compiler with C++20 (g++ 11 or clang 14 and later) is needed; the environment variable CXX selects one."
        )
