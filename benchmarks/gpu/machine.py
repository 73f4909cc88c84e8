"""The machine that is measured: its names and versions, and how fast it reads and multiplies at best."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpu.clock import Clock

PACKAGES = ("torch", "triton", "transformers", "gemlite", "torchao", "bitsandbytes", "hqq")
COPIED = 1 << 30  # bytes, many times any cache
SIDE = 8192


@dataclass(frozen=True)
class Ceilings:
    """What nothing can be faster than, as measured in the same run.

    Attributes:
        bytes_per_second: of a copy, reading and writing counted.
        flops: of a product of two square float16 matrices by cuBLAS.
    """

    bytes_per_second: float
    flops: float

    def seconds(self, nbytes: float, flops: float) -> float:
        """The roofline: the time in which so many bytes can be moved, or so many operations done, whichever is longer."""
        return max(nbytes / self.bytes_per_second, flops / self.flops)


def ceilings(device: torch.device, clock: Clock) -> Ceilings:
    """Measured on ``device``."""
    size, side = (COPIED, SIDE) if not clock.rehearsal else (1 << 16, 64)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = clock.seconds([lambda: target.copy_(source)])
    a, b = (torch.randn(side, side, dtype=torch.float16, device=device) for _ in range(2))
    product = clock.seconds([lambda: a @ b])
    return Ceilings(2 * size / copy, 2 * side**3 / product)


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions."""
    found = {"python": platform.python_version(), "versions": _versions(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    if device.type != "cuda":
        return {"device": f"none: a rehearsal on {platform.machine()}", "driver": None, **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "driver": _driver(),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        **found,
    }


def allocated(device: torch.device) -> int:
    """Bytes of tensors on the GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def l2_bytes(device: torch.device) -> int:
    """Of the cache that all multiprocessors share."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def as_json(found: Ceilings) -> dict[str, float]:
    """For the results."""
    return asdict(found)


def _driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return (told.splitlines() or [None])[0]


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in PACKAGES}
