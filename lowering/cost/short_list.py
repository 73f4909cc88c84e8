"""The configurations of the Triton kernel that are worth measuring: a few of the fastest by the cost model.

The kernel's own default is always among them, so that measuring cannot make it slower.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kbit_inductor.kernels.triton.config import DECODE_ROWS, LEAST_STEPS, Config
from kbit_inductor.kernels.words import WordLayout
from kbit_inductor.lowering.cost import time, triton_linear
from kbit_inductor.lowering.cost.device import DeviceRecord
from kbit_inductor.lowering.problem import Problem

LENGTH = 8
ALIKE = 2  # configurations that differ in their stages alone, which the model tells apart least
OF_A_TILE = 4
"""Configurations of one tile: what the model is wrong about in a tile, it is wrong about in all of them."""
STEPPED = 2  # pieces of a step where a block is not unrolled


@dataclass(frozen=True)
class Ranked:
    """A configuration and its expected time in seconds."""

    config: Config
    seconds: float


def short_list(problem: Problem, m: int, device: DeviceRecord, length: int = LENGTH) -> list[Ranked]:
    """The ``length`` configurations with the least expected time for ``m`` rows of x, the fastest first, and the default.

    No more than :data:`ALIKE` of them differ in their stages alone, and no more than :data:`OF_A_TILE` have the same tile, so that
    a list holds more than one guess. Of equal times the first in :func:`candidates` comes first, so the list is the same on every
    machine.
    """
    ranked = [Ranked(config, _seconds(problem, m, config, device)) for config in candidates(problem, m, device)]
    alike: Counter[Config] = Counter()
    of_tile: Counter[tuple[int, int, int]] = Counter()
    best: list[Ranked] = []
    for each in sorted(ranked, key=lambda each: each.seconds):
        shape = dataclasses.replace(each.config, num_stages=1)
        tile = (shape.block_m, shape.block_n, shape.steps)
        if len(best) < length and alike[shape] < ALIKE and of_tile[tile] < OF_A_TILE:
            best.append(each)
            alike[shape] += 1
            of_tile[tile] += 1
    usual = triton_linear.default(problem, m, device)
    if usual not in (each.config for each in best):
        best[length - 1 :] = [Ranked(usual, _seconds(problem, m, usual, device))]
    return sorted(best, key=lambda each: each.seconds)


def candidates(problem: Problem, m: int, device: DeviceRecord) -> Iterator[Config]:
    """The kernel's default, and every other configuration that the kernel takes and the device holds."""
    usual = triton_linear.default(problem, m, device)
    yield usual
    for config in _combinations(problem, m, device):
        needed = triton_linear.resources(problem, config, device)
        if config != usual and needed.registers <= triton_linear.MOST_REGISTERS and needed.shared <= device.shared_memory:
            yield config


def _combinations(problem: Problem, m: int, device: DeviceRecord) -> Iterator[Config]:
    layout = WordLayout.of(problem.bits, problem.columns, problem.group_size)
    loops: list[tuple[tuple[int, ...], tuple[int, ...], int, bool, tuple[int, ...]]] = []
    x = triton_linear.operand_dtype(problem)
    if m <= DECODE_ROWS and x != torch.float32:
        loops.append(((device.least_rows if m <= device.least_rows else 16,), (16, 32, 64), layout.block_pieces, False, (1, 2, 4)))
    widest = 32 if x == torch.float32 else 128
    blocks_m = tuple(block for block in (16, 32, 64, 128) if block <= widest and block < 2 * max(m, 16))
    loops.append((blocks_m, (32, 64, 128), STEPPED, m > DECODE_ROWS, (2, 4, 8)))
    for blocks_m, blocks_n, steps, sums, warps in loops:
        most = max(1, layout.pieces // steps // LEAST_STEPS)
        splits = [split for split in (1, 2, 3, 4, 6, 8, 16, 32) if split <= most]
        for block_m, block_n, split, warp, stages in itertools.product(blocks_m, blocks_n, splits, warps, (2, 3, 4)):
            if block_n >= 16 * warp or block_m >= 16 * warp:  # each warp has rows of an instruction of its own
                yield Config(block_m, block_n, steps, sums, split, warp, stages)


def _seconds(problem: Problem, m: int, config: Config, device: DeviceRecord) -> float:
    return float(time.seconds(triton_linear.linear(problem, config, device), device, m))
