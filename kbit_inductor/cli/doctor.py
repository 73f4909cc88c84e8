"""What this machine has of what the kernels need, and how to mend what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kbit_inductor.kernels.cpu import build
from kbit_inductor.lowering.registry import cpu_library_problem
from kbit_inductor.lowering.requirements import gpu_problem, triton_problem


@dataclass(frozen=True)
class Check:
    """One thing that was looked for.

    Attributes:
        name: of it.
        found: what there is, or what is wrong.
        ok: whether it is there and usable.
        needed: whether packed models are slow or do not run without it, on any machine.
        mend: what to do where it is not.
    """

    name: str
    found: str
    ok: bool = True
    needed: bool = False
    mend: str = ""


def checks() -> Iterator[Check]:
    """All of them, in order."""
    yield Check("python", platform.python_version())
    yield Check("torch", torch.__version__)
    yield Check("processor", f"{platform.machine()}, {os.cpu_count()} logical CPUs, {torch.get_num_threads()} threads")
    yield from _cpu()
    yield from _gpu()
    for package, what in (("transformers", "models of Hugging Face"), ("gguf", "GGUF files"), ("accelerate", "GGUF files")):
        there = importlib.util.find_spec(package) is not None
        yield Check(package, "installed" if there else "not installed", there, mend=f"for {what}: pip install {package}")


def _cpu() -> Iterator[Check]:
    compiler = (os.environ.get("CXX") or "g++").split()[0]
    path = shutil.which(compiler)
    problem = cpu_library_problem()
    yield Check(
        "C++ compiler", path or f"{compiler!r} is not on PATH", path is not None, problem is not None,
        "install g++ (Debian, Ubuntu: apt-get install g++), or set CXX; Inductor needs one too",
    )  # fmt: skip
    mend = "see the message; without the library products run on plain PyTorch, slowly"
    yield Check("CPU kernels", str(build.build()) if problem is None else problem, problem is None, True, mend)
    if problem is None:
        sets = ", ".join(torch.ops.kbit.isas_cpu())
        yield Check("instruction set", f"{torch.ops.kbit.isa_cpu()} (of {sets}; KBIT_ISA chooses)")
    cache = build.cache_dir()
    writable = os.access(cache if cache.exists() else cache.parent, os.W_OK)
    yield Check("cache of kernels", str(cache), writable, mend="make it writable, or set KBIT_CACHE_DIR to a folder that is")


def _gpu() -> Iterator[Check]:
    problem = triton_problem()
    found = importlib.import_module("triton").__version__ if problem is None else problem
    yield Check("Triton", found, problem is None, mend="see the message; without it products on a GPU run on plain PyTorch, slowly")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        yield Check("GPU", "none that torch can use", False, mend="for kernels on a GPU: a torch with CUDA or ROCm, and its driver")
    for index in range(gpus):
        problem = gpu_problem(index)
        mend = "layers on it are computed by the slow reference kernel"
        yield Check(f"GPU {index}", torch.cuda.get_device_name(index) if problem is None else problem, problem is None, mend=mend)
