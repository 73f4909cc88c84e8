"""What a measured configuration holds for: a device, the sources of the kernel, and a bucket of shapes."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import kbit_inductor.kernels as kernels
from kbit_inductor.lowering.problem import Problem

SHARED = ("words.py", "layout.py")
RULE = "config.py"  # for the default configuration: what was measured holds whatever it says


@dataclass(frozen=True)
class Place:
    """Where times were measured.

    Attributes:
        device: the name that its driver gives.
        source: hash of the kernel's sources and of Triton's version.
    """

    device: str
    source: str

    @property
    def file_name(self) -> str:
        """For the times of this place, and no other's."""
        return f"{re.sub(r'[^A-Za-z0-9]+', '-', self.device)}-{self.source}.json"


@functools.cache
def source_hash() -> str:
    """Of the kernel's sources and Triton's version: times of another kernel are none of this one."""
    folder = Path(kernels.__file__).parent
    digest = hashlib.sha256(_triton_version().encode())
    for path in (*(folder / name for name in SHARED), *sorted((folder / "triton").glob("*.py"))):
        if path.name != RULE:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def place_of(device: torch.device) -> Place:
    """The place of a GPU of this machine. Two of different kinds have different ones."""
    return Place(torch.cuda.get_device_name(device), source_hash())


def bucket(m: int) -> int:
    """The rows of x that times of ``m`` rows are kept under: the next power of two."""
    return 1 << max(0, m - 1).bit_length()


def shape_key(problem: Problem, m: int) -> str:
    """The name of a bucket of shapes in a file: all that a kernel is compiled for, and the rows of x by :func:`bucket`."""
    kind = f"{str(problem.dtype).removeprefix('torch.')}-{problem.bits}bit-g{problem.group_size}"
    flags = ("" if problem.uniform else "-codebook") + ("-symmetric" if problem.symmetric else "")
    flags += "" if problem.activation_bits == 16 else f"-a{problem.activation_bits}"
    return f"{kind}{flags}-n{problem.rows}-k{problem.columns}-m{bucket(m)}"


_SHAPE = re.compile(
    r"(?P<dtype>\w+)-(?P<bits>\d+)bit-g(?P<group>\d+)(?P<codebook>-codebook)?(?P<symmetric>-symmetric)?(?:-a(?P<a>-?\d+))?"
    r"-n(?P<n>\d+)-k(?P<k>\d+)-m(?P<m>\d+)"
)


def problem_of(shape: str) -> tuple[Problem, int]:
    """The problem and the rows of x that :func:`shape_key` has named ``shape``.

    Raises:
        ValueError: it is no such name.
    """
    found = _SHAPE.fullmatch(shape)
    if found is None:
        raise ValueError(f"{shape!r} is no shape of a table of measured times")
    problem = Problem(
        "linear", "cuda", getattr(torch, found["dtype"]), int(found["n"]), int(found["k"]), int(found["bits"]), int(found["group"]),
        found["codebook"] is None, int(found["a"] or 16), found["symmetric"] is not None,
    )  # fmt: skip
    return problem, int(found["m"])
