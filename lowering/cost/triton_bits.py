"""The work of the Triton kernels that count bits (kernels/triton/bits.py).

A program computes one row of x; a word is 32 columns of one bit. Each word of the weight meets the words of x of as many bits as x
has, and each such pair is an AND, a popcount and an addition. What is said of instructions is what the kernels compile to for sm_90
(benchmarks/results/gpu_instructions.json), a popcount taking the time of eight: NVIDIA's GPUs count 16 words in a clock for each
multiprocessor (CUDA C++ Programming Guide, "Arithmetic Instructions").
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from kbit_inductor.lowering.cost.device import DeviceRecord
from kbit_inductor.lowering.cost.products import PACKED, A, bound
from kbit_inductor.lowering.cost.work import BITS, K, M, N, Work
from kbit_inductor.lowering.problem import Problem

WORD = 32  # columns
POPCOUNT, AMD_POPCOUNT = 8, 12  # instructions in whose time one is done; AMD's are shifts and additions
FIXED, PAIR = 12, 3
"""Instructions for each word of codes: scale, step and offset of the sum; and for each pair of bits beside the popcount."""
SLICING = 61  # instructions for each activation to become bits
BLOCK_N, WARPS, RESIDENT = 16, 4, 16

J, COUNT = sympy.symbols("j count", positive=True)  # bits of an activation; instructions in whose time a popcount is done
PAIRS = BITS * J
POPCOUNTS = PAIRS + sympy.Piecewise((BITS, sympy.Eq(J, 1)), (0, True))
"""Of a word of codes; of one bit, x is counted beside its difference from the codes."""
COUNTING = Work(
    bytes=PACKED + A * M * N,
    l2_bytes=M * PACKED,
    instructions=M * N * K / WORD * (FIXED + PAIR * PAIRS + COUNT * POPCOUNTS),
    programs=sympy.ceiling(N / BLOCK_N) * M,
    resident=RESIDENT,
    warps=WARPS,
)
SLICED = Work(bytes=A * M * K + M * K / WORD * 4 * (J + 2), instructions=SLICING * M * K, then=COUNTING)
"""Activations cut into bits, then :data:`COUNTING`."""


def works(problem: Problem, device: DeviceRecord) -> Sequence[Work]:
    """The one way there is."""
    return [bound(SLICED, problem).at(j=problem.activation_bits, count=AMD_POPCOUNT if device.is_amd else POPCOUNT)]
