"""What the machine allows: bytes read in a second, multiplications in a second.

Bandwidth is read by a few lines of C++ (``read.cpp``), since none of torch's reductions reaches it. The peaks of arithmetic are
those of oneDNN's square products, as torch calls it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cpu.timing import Budget, Call, interleave, summary

SOURCE = Path(__file__).with_name("read.cpp")
PAGES = {"4k": "MADV_NOHUGEPAGE", "huge": "MADV_HUGEPAGE"}
ALIGNMENT = 2 << 20  # a huge page


def measure(budget: Budget, size: int = 256 << 20, width: int = 2048) -> dict[str, Any]:
    """Ceilings of this machine with torch's number of threads.

    ``read_bandwidth``: bytes per second, by kind of page, of ``size`` bytes. ``peaks``: operations per second, two for each
    multiply-add, of ``width`` × ``width`` × ``width`` products.
    """
    reads: dict[str, Call] = {}
    missing = {}
    try:
        read = _reader()
        reads = {kind: partial(read, _buffer(size, advice)) for kind, advice in PAGES.items()}
    except (OSError, subprocess.CalledProcessError) as error:
        missing["read_bandwidth"] = f"read.cpp does not compile: {error}"
    products = {name: make(width) for name, make in PRODUCTS.items()}
    times = interleave({name: [call] for name, call in (reads | products).items()}, budget)
    medians = {name: summary(seconds)["median"] for name, seconds in times.items()}
    return {
        "threads": torch.get_num_threads(),
        "read_bandwidth": {kind: size / medians[kind] for kind in reads},
        "peaks": {name: 2 * width**3 / medians[name] for name in products},
        "missing": missing,
    }


def bandwidth(ceilings: dict[str, Any]) -> float | None:
    """The highest bandwidth measured, which no kernel can read faster than, in bytes per second."""
    return max(ceilings["read_bandwidth"].values(), default=None)


def _reader() -> Callable[[torch.Tensor], int]:
    """A function that reads all of a tensor."""
    with tempfile.TemporaryDirectory(prefix="kbit-read-") as folder:
        library = Path(folder) / "read.so"
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(library)], check=True, capture_output=True)
        function = ctypes.CDLL(str(library)).read_all  # stays loaded when the file goes
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda data: int(function(data.data_ptr(), data.nbytes // 8, torch.get_num_threads()))


def _buffer(size: int, advice: str) -> torch.Tensor:
    """``size`` bytes that begin at a huge page's border, on pages of the advised kind where the system has the choice."""
    memory = mmap.mmap(-1, size + ALIGNMENT)
    if (value := getattr(mmap, advice, None)) is not None:
        memory.madvise(value)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + size].fill_(1)


def _float_product(dtype: torch.dtype, width: int) -> Call:
    left, right = (torch.randn(width, width).to(dtype) for _ in range(2))
    return partial(torch.mm, left, right.t())


def _int8_product(width: int) -> Call:
    """Unsigned activations and signed weights, the pair that VNNI multiplies, with weights in oneDNN's own order."""
    activations = torch.randint(0, 256, (width, width), dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 128, (width, width), dtype=torch.int8).t(), [width, width])
    scales, zeros = torch.ones(width), torch.zeros(width, dtype=torch.int32)
    return partial(
        torch.ops.onednn.qlinear_pointwise, activations, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip


PRODUCTS: dict[str, Callable[[int], Call]] = {
    "int8": _int8_product,
    "bf16": partial(_float_product, torch.bfloat16),
    "fp32": partial(_float_product, torch.float32),
}
