"""What the Triton kernels need of a machine, and what is wrong where it is not there."""

from __future__ import annotations

import functools
import importlib
import re

import torch

LEAST_TRITON = (3, 6)
"""What torch 2.11, the oldest that this package takes, brings."""
FP8_CAPABILITY = (8, 9)
"""Of an NVIDIA GPU whose tensor cores multiply e4m3."""
LEAST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU: the oldest that the kernels are compiled for in the tests. It is the first with bfloat16 in tensor cores."""


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used, or None when it can."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import ({error}); pip install triton"
    found = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
    if found < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return f"Triton is {triton.__version__}, the kernels need {least} or later; pip install --upgrade torch brings one"
    return None


@functools.cache
def gpu_problem(index: int) -> str | None:
    """Why the GPU of this index is too old for the kernels, or None. A GPU that is not there is taken for a new one."""
    if torch.version.hip is not None or not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
    return f"GPU {index}, {torch.cuda.get_device_name(index)}, has compute capability {found}; the kernels need {least} or later"


@functools.cache
def fp8_problem(index: int) -> str | None:
    """Why the tensor cores of the GPU of this index multiply no 8-bit floats, or None. One not there is taken for new."""
    if torch.version.hip is not None:
        return "AMD's 8-bit floats are others"
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    if (capability := torch.cuda.get_device_capability(index)) >= FP8_CAPABILITY:
        return None
    found, least = (".".join(map(str, version)) for version in (capability, FP8_CAPABILITY))
    return f"GPU {index} has compute capability {found}; they begin with {least}"
