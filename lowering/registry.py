"""Which kernel computes a ``kbit::`` operator: frozen records, asked in order of cost.

A kernel says by ``supports`` whether it can compute a problem, and why not; among those that can, the least ``cost`` wins. The
reference supports everything, and a choice that falls back to it carries the reasons. (Registry of frozen records with a
capability predicate: after torch-TensorRT's converter registry.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kbit_inductor.kernels.cpu import build, compiler
from kbit_inductor.kernels.layout import FP8, WORD_COLUMNS, group_count
from kbit_inductor.lowering import batched as _batched_operators  # noqa: F401  (defines them)
from kbit_inductor.lowering import cpu as _cpu_operators  # noqa: F401  (defines them)
from kbit_inductor.lowering import gpu as _gpu_operators  # noqa: F401  (defines them)
from kbit_inductor.lowering import ops, requirements
from kbit_inductor.lowering.problem import Problem

if TYPE_CHECKING:
    from kbit_inductor.lowering.cost.device import DeviceRecord
    from kbit_inductor.lowering.cost.work import Work

MAX_BIT_VECTORS = 4
BIT_PAIRS = {"avx512vnni": 3, "avx512": 3, "avxvnni": 1, "avx2": 3, "neon": 1, "portable": 3}
"""Bits of a code times bits of an activation up to which counting them is faster than multiplying 8-bit numbers.

Those of ``avxvnni`` and ``neon`` are guesses: no such machine was measured."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MATRIX_FAMILIES = ("linear", "embedding")


@dataclass(frozen=True)
class Kernel:
    """A way to compute a family of operators.

    Attributes:
        name: shown to the user.
        suffix: of its operators, ``kbit::{family}{suffix}`` for each family.
        supports: None when it can compute a problem, else the reason why not.
        cost: its time for one row of activations, in bytes that could be read meanwhile: the measure by which kernels are
            compared. Of equals, the first in :data:`KERNELS` is chosen.
        layout: of the packed weights that it reads: ``"planes"`` (kernels/layout.py), ``"words"`` (kernels/words.py),
            ``"tiled"`` or ``"vectors"`` (kernels/cpu/tiled.h).
        works: the ways in which it can compute a problem on a device, as expressions in M (:mod:`kbit_inductor.lowering.cost`);
            the fastest is what it takes. None: reading ``cost`` bytes.
        rounds: whether its products round activations: ``activation_bits`` is then their last argument.
    """

    name: str
    suffix: str
    supports: Callable[[Problem], str | None]
    cost: Callable[[Problem], float]
    layout: str = "planes"
    works: Callable[[Problem, DeviceRecord], Sequence[Work]] | None = None
    rounds: bool = False


@dataclass(frozen=True)
class Choice:
    """The kernel picked for a problem and, by name, why each other one was not."""

    kernel: Kernel
    rejected: tuple[tuple[str, str], ...]
    problem: Problem | None = None

    def overload(self, family: str) -> ops.Operator:
        """The operator that calls the kernel."""
        return ops.overload(family, self.kernel.suffix)


def choose(problem: Problem, kernels: Sequence[Kernel] | None = None) -> Choice:
    """The cheapest of ``kernels`` (default: :data:`KERNELS`) that supports ``problem``."""
    able: list[Kernel] = []
    rejected: list[tuple[str, str]] = []
    for kernel in KERNELS if kernels is None else kernels:
        reason = kernel.supports(problem)
        if reason is None:
            able.append(kernel)
        else:
            rejected.append((kernel.name, reason))
    best = min(able, key=lambda kernel: kernel.cost(problem))
    slower = [(kernel.name, "is estimated to be slower") for kernel in able if kernel is not best]
    return Choice(best, (*rejected, *slower), problem)


@functools.cache
def cpu_library_problem() -> str | None:
    """Why the compiled CPU library is not there, or None when it is loaded."""
    try:
        build.load()
    except compiler.CpuBuildError as error:
        return str(error)
    return None


def _cpu_supports(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"runs on a CPU, the weight is on {problem.device}"
    if problem.dtype not in FLOATS:
        return f"takes float32, bfloat16 and float16, not {problem.dtype}"
    return cpu_library_problem()


def _bits_supports(problem: Problem) -> str | None:
    if (reason := _cpu_supports(problem)) is not None:
        return reason
    if problem.family not in MATRIX_FAMILIES:
        return "takes one matrix, not a batch of them"
    if problem.activation_bits > MAX_BIT_VECTORS:
        return f"is for activation_bits up to {MAX_BIT_VECTORS}, not {problem.activation_bits}"
    if problem.cascade:
        return "reads no cascade"
    return None if problem.uniform else "takes uniform codes, not a codebook"


def _bits_cost(problem: Problem) -> float:
    """Every bit of a code meets every bit of an activation: up to some number of pairs that hides behind reading."""
    groups, pairs = group_count(problem.columns, problem.group_size), problem.bits * problem.activation_bits
    padded = groups * -(-problem.group_size // WORD_COLUMNS) * WORD_COLUMNS
    return problem.packed_bytes * max(padded / max(problem.columns, 1), pairs / BIT_PAIRS[torch.ops.kbit.isa_cpu()])


def _triton_supports(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"runs on a GPU, the weight is on {problem.device}"
    if problem.dtype not in FLOATS:
        return f"takes float32, bfloat16 and float16, not {problem.dtype}"
    return requirements.triton_problem() or requirements.gpu_problem(problem.device_index)


def _triton_cost(problem: Problem) -> float:
    """By instructions: while an H200 reads a code of k bits it can execute 7 k / 8, and a code takes at least one and a half."""
    return problem.packed_bytes * max(1.0, 1.5 / (0.875 * problem.bits))


def _triton_bits_supports(problem: Problem) -> str | None:
    if problem.device != "cuda" or problem.dtype not in FLOATS:
        return _triton_supports(problem)
    if problem.family != "linear":
        return "computes products with one matrix"
    if problem.activation_bits == FP8:
        return "counts bits of integers, not of floats"
    if problem.activation_bits > MAX_BIT_VECTORS:
        return f"is for activation_bits up to {MAX_BIT_VECTORS}, not {problem.activation_bits}"
    if problem.columns % WORD_COLUMNS or problem.group_size % WORD_COLUMNS:
        return f"takes rows and groups of multiples of {WORD_COLUMNS} columns, not of {problem.columns} and {problem.group_size}"
    return _triton_supports(problem) if problem.uniform else "takes uniform codes, not a codebook"


def _triton_bits_cost(problem: Problem) -> float:
    """While an H200 reads a word of a plane, it can count 3 of them; a plane is counted once for each bit of an activation."""
    return problem.packed_bytes * max(1.0, problem.activation_bits / 3)


def _reference_bytes(problem: Problem) -> float:
    # Codes are spread to bytes, turned into floats, scaled, and read by the product: each a pass over memory.
    return problem.packed_bytes + problem.rows * problem.columns * (1 + 1 + 4 * 6)


# Imported where they are called: sympy takes half a second.
def _cpu_works(problem: Problem, device: DeviceRecord) -> Sequence[Work]:
    from kbit_inductor.lowering.cost import products

    return products.cpu(problem, device)


def _triton_works(problem: Problem, device: DeviceRecord) -> Sequence[Work]:
    from kbit_inductor.lowering.cost import triton_ways

    return triton_ways.works(problem, device)


def _triton_bits_works(problem: Problem, device: DeviceRecord) -> Sequence[Work]:
    from kbit_inductor.lowering.cost import triton_bits

    return triton_bits.works(problem, device)


def _reference_works(problem: Problem, device: DeviceRecord) -> Sequence[Work]:
    from kbit_inductor.lowering.cost import products

    return products.reference(problem, device)


KERNELS = (
    Kernel("bits", "_cpu", _bits_supports, _bits_cost, "vectors", rounds=True),
    Kernel("cpu", "_cpu", _cpu_supports, lambda problem: problem.packed_bytes, "tiled", _cpu_works, rounds=True),
    Kernel("triton", "_triton", _triton_supports, _triton_cost, "words", _triton_works, rounds=True),
    Kernel("triton-bits", "_triton_bits", _triton_bits_supports, _triton_bits_cost, "planes", _triton_bits_works, rounds=True),
    Kernel("reference", "", lambda problem: None, _reference_bytes, "planes", _reference_works),
)
