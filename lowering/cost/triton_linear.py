"""The work of the Triton kernels for products (kernels/triton/linear.py, grouped.py), cut as a configuration says.

Instructions are counted, not guessed: ``instructions.json`` holds what the compiled main loops execute for each weight beside the
products and the scaling of sums, and the registers of a thread (benchmarks/gpu/cost_table.py). Both were counted at the default
configurations; what another one differs by follows from the codes and sums that a thread of it holds, and is compared with what
some of them compile to (benchmarks/gpu/short_list.py). Activations other than float16 were counted for one target, and differ from
float16 on others by as much.

A batch of matrices is the same work, with rows of x cut into tiles matrix by matrix. Rounded activations are a kernel in front
(kernels/triton/quantize.py), and bytes to the product.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import sympy
import torch

from kbit_inductor.kernels.layout import FP8, MAX_BITS
from kbit_inductor.kernels.triton.config import FP8_BITS, Config, Device, default_config, held_dtype, shared_bytes
from kbit_inductor.kernels.words import WordLayout
from kbit_inductor.lowering.cost.device import DeviceRecord
from kbit_inductor.lowering.cost.products import MATRIX, USED, A, bound
from kbit_inductor.lowering.cost.work import BITS, K, M, N, Work
from kbit_inductor.lowering.problem import Problem

TABLE = Path(__file__).with_name("instructions.json")
LAUNCHED = Path(__file__).with_name("registers.json")
GRANULE = 8  # registers of a thread are given out by as many
STAND_IN = "sm_80"
COUNTED_ELSEWHERE = "sm_90"  # activations other than float16
NOT_ROUNDED = 16
MOST_REGISTERS = 230  # by estimate: a thread has 255, and one that would need a few more spills
LEAST_REGISTERS = 32
CODE_SHARE = 0.4  # of a thread's registers, for codes, as compiled with twice as many
SHARING_REGISTERS = 16  # to add up the shares of several programs, as some of the compiled kernels have them
TILES = 3
"""Float tiles of the result that a program holds: the sum, that of a group, and the sums of x."""
STEP_INSTRUCTIONS = 200
"""Of a thread in a step of two pieces, however many weights it has: for x, for addresses, for waiting."""
WGMMA_OPERANDS = 1.0
"""Instructions for each weight that bring it to where ``wgmma`` reads, when there are few rows of x."""
MMA_WEIGHTS = {torch.int8: 16, torch.float8_e4m3fn: 16}  # else 8
"""For each thread, that an instruction multiplies with 8 rows of x: mma.sync takes 16 x 16, or 16 x 32 of 8 bits."""
SCALING = {torch.int8: 4}  # instructions for each sum of a group, to convert it and apply step and scale; else those of the scale
LEAST_BYTE_PIECE = 32  # columns that products of 8 bits take; fewer are multiplied as float16
ROUNDING_INSTRUCTIONS = 42  # for each activation, as the kernel compiles for sm_90
SEGMENT = 128  # columns that share a step

COLUMNS, BLOCK_M, BLOCK_N, STEPS, PIECE, SPAN, SPLIT_K, WARPS, STAGES = sympy.symbols(
    "columns block_m block_n steps piece span split_k warps stages", positive=True
)
X, UNPACKING, REGISTERS, PASSES, SCALE, SUMS, MMA, SHARED = sympy.symbols(
    "X unpacking registers passes scale sums mma shared", positive=True
)
WARP, ALL_REGISTERS, ALL_THREADS, ALL_SHARED = sympy.symbols("warp all_registers all_threads all_shared", positive=True)

_TILES_M, _TILES_N = USED * sympy.ceiling(M / USED / BLOCK_M), sympy.ceiling(N / BLOCK_N)
_PADDED_M, _PADDED_N = _TILES_M * BLOCK_M, _TILES_N * BLOCK_N
_THREADS = WARPS * WARP
LINEAR = Work(
    bytes=USED * MATRIX * COLUMNS / K + M * (X * K + A * N),
    l2_bytes=_TILES_M * MATRIX + _TILES_N * M * K * X + (SPLIT_K - 1) * 8 * _PADDED_M * _PADDED_N,
    instructions=_TILES_M * _PADDED_N * COLUMNS * (UNPACKING + SCALE * BLOCK_M / (SPAN * PIECE) + MMA * BLOCK_M / 8),
    products=2 * _PADDED_M * _PADDED_N * COLUMNS * PASSES,
    launches=1 + sympy.Min(SPLIT_K - 1, 1) + SUMS,
    programs=_TILES_M * _TILES_N * SPLIT_K,
    resident=sympy.floor(sympy.Min(ALL_THREADS / _THREADS, ALL_REGISTERS / (REGISTERS * _THREADS), ALL_SHARED / SHARED, 32)),
    warps=WARPS,
    in_flight=(STAGES - 1) * STEPS * PIECE * BLOCK_N * BITS / 8,
)
"""``columns`` are those of a row with its padding; ``passes`` products of the matrix units for each product of the sum, ``mma``
instructions of theirs for each weight and 8 rows of x, ``scale`` instructions for each sum of a group, ``X`` bytes of what is read
of an activation. While one of the stages is computed, the others are under way."""
ROUNDING = Work(bytes=M * K * A + M * COLUMNS * (X + 8 / SEGMENT), instructions=ROUNDING_INSTRUCTIONS * M * COLUMNS, then=LINEAR)
"""Activations rounded, with a step and a sum for each segment, then the product."""


class Resources(NamedTuple):
    """What a program takes: 32-bit registers of a thread, estimated, and bytes of shared memory, with what the device keeps."""

    registers: int
    shared: int


@functools.cache
def _table() -> dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]:
    """By target, dtype of activations, loop and bits."""
    found: dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def hardware(device: DeviceRecord) -> Device:
    """The device as the kernel's rule for configurations sees it."""
    shared = device.shared_memory - device.kept_shared
    return Device(device.multiprocessors, device.has_wgmma, device.least_rows, shared, not device.is_amd, device.takes_fp8)


def linear(problem: Problem, config: Config, device: DeviceRecord) -> Work:
    """The work of a product with a configuration, in M, the rows of x of all matrices."""
    layout = WordLayout.of(problem.bits, problem.columns, problem.group_size)
    span, needed = math.gcd(layout.group_pieces, config.steps, 2), resources(problem, config, device)
    x, rounded = _held(problem, config, device), problem.activation_bits != NOT_ROUNDED
    multiplied = torch.float16 if x.itemsize == 1 and layout.piece < LEAST_BYTE_PIECE else x
    passes = _digits(problem, x) + (0 if config.sums or rounded else _parts(problem))
    return bound(ROUNDING if rounded else LINEAR, problem).at(
        columns=layout.padded_columns, piece=layout.piece, span=span, steps=config.steps, X=x.itemsize,
        block_m=config.block_m, block_n=config.block_n, split_k=config.split_k, warps=config.num_warps, stages=config.num_stages,
        sums=float(config.sums and not rounded), scale=SCALING.get(x, 2),
        passes=passes / device.speedup(multiplied),
        mma=0.0 if uses_wgmma(config, device) else passes / MMA_WEIGHTS.get(multiplied, 8),
        unpacking=_unpacking(problem, config, device), registers=needed.registers, shared=needed.shared,
        warp=device.warp, all_registers=device.registers, all_threads=device.threads, all_shared=device.shared_memory,
    )  # fmt: skip


def resources(problem: Problem, config: Config, device: DeviceRecord) -> Resources:
    """What a program of a configuration takes: registers as it compiles, if it is launched by default, else by estimate."""
    layout = WordLayout.of(problem.bits, problem.columns, problem.group_size)
    unrolled = config.steps == layout.block_pieces
    known = default(problem, 1 if unrolled else 256, device)
    registers = _launched_registers(problem, config, device) or _estimated_registers(problem, config, known, device)
    if config.split_k > max(1, known.split_k):
        registers += SHARING_REGISTERS
    shared = shared_bytes(config, layout, operand_dtype(problem), hardware(device))
    return Resources(GRANULE * math.ceil(registers / GRANULE), shared + device.kept_shared)


def _launched_registers(problem: Problem, config: Config, device: DeviceRecord) -> int:
    """Of a thread, as compiled; 0 of what is not launched by default."""
    x = str(operand_dtype(problem)).removeprefix("torch.")
    return _launched().get(device.target, {}).get(x, {}).get(str(problem.bits), {}).get(name_of(config), 0)


def _estimated_registers(problem: Problem, config: Config, known: Config, device: DeviceRecord) -> float:
    """Of a thread, by those of the configuration ``known``."""
    counted = _counted(problem, config, device)["registers"]
    longer = max(1, config.block_n / config.num_warps / (known.block_n / known.num_warps))  # codes that a thread holds
    more = (config.block_m * config.block_n / config.num_warps - known.block_m * known.block_n / known.num_warps) / device.warp
    # The compiler gives half of it back.
    return max(LEAST_REGISTERS, counted * (1 + CODE_SHARE * (longer - 1)) + TILES * max(more, more / 2))


def name_of(config: Config) -> str:
    """What registers are listed under: all but how many programs share a tile, and how many stages there are."""
    return f"{config.block_m}x{config.block_n}x{config.steps}-{config.num_warps}" + ("-sums" if config.sums else "")


@functools.cache
def _launched() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(LAUNCHED.read_text(encoding="utf-8"))
    return found


def uses_wgmma(config: Config, device: DeviceRecord) -> bool:
    """Whether Triton multiplies with a group of four warps: from 64 rows of the left operand, the weight, on."""
    return device.has_wgmma and config.num_warps >= 4 and config.block_n >= 64


def _unpacking(problem: Problem, config: Config, device: DeviceRecord) -> float:
    """Instructions for each weight but for the products and the scaling of sums."""
    layout = WordLayout.of(problem.bits, problem.columns, problem.group_size)
    if config.steps == layout.block_pieces:
        return _counted(problem, config, device)["per_weight"] + (WGMMA_OPERANDS if uses_wgmma(config, device) else 0)
    known = default(problem, 256, device)
    fewer = known.num_warps / known.block_n, config.num_warps / config.block_n
    step = STEP_INSTRUCTIONS * device.warp / (config.steps * layout.piece)
    return max(1.0, _counted(problem, config, device)["per_weight"] + step * (fewer[1] - fewer[0]))


def _counted(problem: Problem, config: Config, device: DeviceRecord) -> dict[str, float]:
    """Those of float16 on the device's target, and what the activations of ``problem`` differ by where they were counted."""
    unrolled = config.steps == WordLayout.of(problem.bits, problem.columns, problem.group_size).block_pieces
    loop, bits, x = "unrolled" if unrolled else "stepped", str(problem.bits), str(operand_dtype(problem)).removeprefix("torch.")
    table = _table()
    own = {**table[STAND_IN]["float16"][loop][bits], **table.get(device.target, {}).get("float16", {}).get(loop, {}).get(bits, {})}
    other = table[COUNTED_ELSEWHERE].get(x, {}).get(loop, {}).get(bits)
    if other is None:
        return own
    half = table[COUNTED_ELSEWHERE]["float16"][loop][bits]
    return {name: own[name] + other[name] - half[name] for name in own}


def operand_dtype(problem: Problem) -> torch.dtype:
    """Of x, as products with it are cut."""
    return {NOT_ROUNDED: problem.dtype, FP8: torch.float8_e4m3fn}.get(problem.activation_bits, torch.int8)


def _held(problem: Problem, config: Config, device: DeviceRecord) -> torch.dtype:
    """Of x, as the product reads it."""
    return held_dtype(operand_dtype(problem), config, problem.bits, device.takes_fp8)


def default(problem: Problem, m: int, device: DeviceRecord) -> Config:
    """The kernel's own configuration for ``m`` rows of x of one matrix. Columns of a batch are not split."""
    layout = WordLayout.of(problem.bits, problem.columns, problem.group_size)
    config = default_config(m, problem.rows, layout, operand_dtype(problem), hardware(device))
    return config if problem.family == "linear" else dataclasses.replace(config, split_k=1)


def _parts(problem: Problem) -> int:
    """Into how many numbers an activation is cut."""
    return 3 if operand_dtype(problem) == torch.float32 else 1


def _digits(problem: Problem, x: torch.dtype) -> int:
    """Products of the matrix units for each of the sum: parts of an activation, held by ``x``, times digits of the level."""
    levels = problem.bits if problem.uniform else MAX_BITS
    longest = {torch.float16: MAX_BITS, torch.int8: MAX_BITS, torch.float8_e4m3fn: FP8_BITS}.get(x, MAX_BITS - 1)
    return _parts(problem) * (2 if levels > longest else 1)
