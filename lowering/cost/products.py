"""The work of products other than Triton's: the least possible, in float, after unpacking to float, and on a CPU.

``A`` is bytes of an activation, ``S`` bytes of the scale and offset of a group, ``E`` the matrices of a batch: ``M`` are then the
rows of all of them. Each matrix is taken to be asked for by some row, where there are as many rows: what a batch without an index
does, and a mixture that spreads its tokens. Then a product does all that it may have to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy

from kbit_inductor.lowering.cost.device import DeviceRecord
from kbit_inductor.lowering.cost.work import BITS, GROUP, K, M, N, Work
from kbit_inductor.lowering.problem import Problem

A, S, E, UNPACKING, LEAST_ROWS = sympy.symbols("A S E unpacking least_rows", positive=True)
SCALES = 4  # bytes of a float16 scale and offset

UNPACK_INSTRUCTIONS = 8  # for each weight, as the kernel compiles for sm_90 (tests/test_cost_model.py)
UNPACK_PROGRAM = {"rows": 16, "columns": 256, "warps": 4, "resident": 16}  # of kernels/triton/dequantize.py

USED = sympy.Max(1, sympy.Min(E, M))
"""Matrices that some row asks for."""
MATRIX = N * K * BITS / 8 + N * sympy.ceiling(K / GROUP) * S
"""Bytes of a packed matrix."""
PACKED = USED * MATRIX
"""Bytes of a packed weight that are read."""
ACTIVATIONS = A * M * (K + N)
"""Bytes of x and of the result."""

ROOFLINE = Work(bytes=PACKED + ACTIVATIONS, products=2 * M * N * K, launches=0, unhidden=0)
"""What no kernel can do without: every byte once, every product once (Williams et al., "Roofline", 2009)."""
FLOAT_PRODUCT = Work(
    bytes=A * USED * N * K + ACTIVATIONS, products=2 * N * K * 16 * USED * sympy.ceiling(M / USED / 16), unhidden=0
)
"""``x @ W.T`` in float by a library, whose instructions take rows of x by 16."""
UNPACKED_PRODUCT = Work(
    bytes=MATRIX + A * N * K,
    instructions=UNPACK_INSTRUCTIONS * N * K,
    programs=sympy.ceiling(N / UNPACK_PROGRAM["rows"]) * sympy.ceiling(K / UNPACK_PROGRAM["columns"]),
    resident=UNPACK_PROGRAM["resident"],
    warps=UNPACK_PROGRAM["warps"],
    then=FLOAT_PRODUCT,
)
"""The weight unpacked to float in memory, then :data:`FLOAT_PRODUCT`."""
UNPACKED_FROM = dataclasses.replace(
    UNPACKED_PRODUCT, launches=sympy.Piecewise((1, LEAST_ROWS <= M), (sympy.oo, True)), way="unpacked, then in float"
)
"""The same, of a kernel that does so from some number of rows on."""
REFERENCE = Work(bytes=PACKED + USED * N * K * (1 + 1 + 4 * 6) + ACTIVATIONS, products=2 * M * N * K, launches=8)
"""In plain PyTorch: codes are spread to bytes, turned into floats, scaled, and read by the product: each a pass over memory."""
CPU_PRODUCT = Work(bytes=PACKED + ACTIVATIONS, instructions=N * K * (USED * UNPACKING + M))
"""The C++ kernels: a weight is unpacked once, for all rows of x."""
LOOKUP = Work(bytes=M * (K * BITS / 8 + sympy.ceiling(K / GROUP) * S) + A * M * K)
"""``M`` rows of an embedding."""


def bound(work: Work, problem: Problem) -> Work:
    """``work`` with the sizes of ``problem``, so that only M is left."""
    scales = SCALES // 2 if problem.symmetric else SCALES
    return work.at(
        N=problem.rows, K=problem.columns, E=problem.matrices, bits=problem.bits, group=problem.group_size,
        A=problem.dtype.itemsize, S=scales,
    )  # fmt: skip


def reference(problem: Problem, device: DeviceRecord) -> Sequence[Work]:
    """The work of plain PyTorch."""
    return [bound(LOOKUP if problem.family == "embedding" else REFERENCE, problem)]


def cpu(problem: Problem, device: DeviceRecord) -> Sequence[Work]:
    """The work of the compiled CPU kernels."""
    if problem.family == "embedding":
        return [bound(LOOKUP, problem)]
    return [bound(CPU_PRODUCT, problem).at(unpacking=device.unpacking)]
