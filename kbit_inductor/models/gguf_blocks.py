"""Blocks of GGUF files as packed weights, code by code: nothing is quantized again.

A block of the older types is 32 columns of a row with a float16 step, and in the types with a ``1`` at the end a float16 minimum.
That is a group of the storage format (docs/format.md), so the values are the same to the last bit.

A block of the K quants is 256 columns in groups of 16 or 32. The step of a group is an integer of 4, 6 or 8 bits times the float16
of the block, and the minimum is another such product. No float16 holds them in general, so they are rounded to one: the codes are
those of the file, and the values differ by the last bit of a step. How the bits lie: llama.cpp, ``ggml-common.h`` and
``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.packing import PackedWeight

Grids = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class BlockType:
    """How a block lies in a file.

    Attributes:
        bits: of a code.
        group_size: columns that share a step.
        columns: of a block.
        nbytes: of a block.
        grids: from blocks, uint8 ``[B, nbytes]``, to steps, float64 ``[B, groups of a block]``, and minima, or None where the
            middle
            code means zero.
        codes: from blocks to codes, uint8 ``[B, columns]``.
    """

    bits: int
    group_size: int
    columns: int
    nbytes: int
    grids: Callable[[Tensor], Grids]
    codes: Callable[[Tensor], Tensor]


def fields(data: Tensor, bits: int) -> Tensor:
    """The fields of ``bits`` of bytes ``[…, n]``, as ``[…, 8 / bits * n]``: first the lowest fields of all bytes, then the next."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    found: Tensor = (data.unsqueeze(-2) >> shifts) & (2**bits - 1)
    return found.flatten(-2)


def in_turn(data: Tensor, bits: int, run: int) -> Tensor:
    """:func:`fields` of runs of ``run`` bytes of ``data`` ``[B, n]``, one run after the other."""
    return fields(data.unflatten(1, (-1, run)), bits).flatten(1)


def bit_by_bit(data: Tensor) -> Tensor:
    """The bits ``[B, 8 * n]`` of bytes ``[B, n]``, lowest first."""
    return ((data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def halves(data: Tensor) -> Tensor:
    """Numbers of two bytes each, as float64."""
    return data.contiguous().view(torch.float16).double()


def six_bit_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and minima, ``[B, 8]`` each, of the 12 bytes of Q4_K and Q5_K.

    Six bits of four of each, and then the lower bits of the others, whose upper bits are above those of the former."""
    low, high, rest = data.unflatten(1, (3, 4)).unbind(1)
    return torch.cat([low & 63, rest & 15 | (low >> 6) << 4], 1), torch.cat([high & 63, rest >> 4 | (high >> 6) << 4], 1)


def six_bit_steps(data: Tensor) -> Tensor:
    """The 16 steps, ``[B, 16]``, of the 12 bytes of Q3_K: lower halves, and then the upper two bits. 32 means zero."""
    return (fields(data[:, :8], 4) | fields(data[:, 8:], 2) << 4).double() - 32


def step_and_minimum(blocks: Tensor) -> Grids:
    """Of the older types: a step, and a minimum."""
    return halves(blocks[:, :2]), halves(blocks[:, 2:4])


def step_alone(blocks: Tensor) -> Grids:
    """Of the older types: a step."""
    return halves(blocks[:, :2]), None


def q2_k_grids(blocks: Tensor) -> Grids:
    """Four bits each of a step and a minimum, the units of both at the end."""
    steps, minima, units = blocks[:, :16] & 15, blocks[:, :16] >> 4, halves(blocks[:, 80:84])
    return units[:, :1] * steps, -units[:, 1:] * minima


def q4_k_grids(blocks: Tensor) -> Grids:
    """Six bits each of a step and a minimum, the units of both in front."""
    units, (steps, minima) = halves(blocks[:, :4]), six_bit_pairs(blocks[:, 4:16])
    return units[:, :1] * steps, -units[:, 1:] * minima


def q3_k_grids(blocks: Tensor) -> Grids:
    """Six bits of a step, the unit at the end."""
    return halves(blocks[:, 108:110]) * six_bit_steps(blocks[:, 96:108]), None


def q6_k_grids(blocks: Tensor) -> Grids:
    """Signed bytes, the unit at the end."""
    return halves(blocks[:, 208:210]) * blocks[:, 192:208].contiguous().view(torch.int8), None


TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(4, 32, 32, 18, step_alone, lambda b: fields(b[:, 2:], 4)),
    "Q4_1": BlockType(4, 32, 32, 20, step_and_minimum, lambda b: fields(b[:, 4:], 4)),
    "Q5_0": BlockType(5, 32, 32, 22, step_alone, lambda b: fields(b[:, 6:], 4) | bit_by_bit(b[:, 2:6]) << 4),
    "Q5_1": BlockType(5, 32, 32, 24, step_and_minimum, lambda b: fields(b[:, 8:], 4) | bit_by_bit(b[:, 4:8]) << 4),
    "Q8_0": BlockType(8, 32, 32, 34, step_alone, lambda b: b[:, 2:] ^ 128),  # signed bytes, of which -128 is code 0
    "Q2_K": BlockType(2, 16, 256, 84, q2_k_grids, lambda b: in_turn(b[:, 16:80], 2, 32)),
    "Q3_K": BlockType(3, 16, 256, 110, q3_k_grids, lambda b: in_turn(b[:, 32:96], 2, 32) | fields(b[:, :32], 1) << 2),
    "Q4_K": BlockType(4, 32, 256, 144, q4_k_grids, lambda b: in_turn(b[:, 16:], 4, 32)),
    "Q5_K": BlockType(5, 32, 256, 176, q4_k_grids, lambda b: in_turn(b[:, 48:], 4, 32) | fields(b[:, 16:48], 1) << 4),
    "Q6_K": BlockType(
        6, 16, 256, 210, q6_k_grids, lambda b: in_turn(b[:, :128], 4, 64) | in_turn(b[:, 128:192], 2, 32) << 4
    ),
}  # fmt: skip


def packed_of(data: Tensor, type_name: str, order: Tensor | None = None, layer: str = "weight") -> PackedWeight:
    """The packed weight of a tensor of a GGUF file.

    Args:
        data: uint8 ``[N, bytes of a row]``, whole blocks.
        type_name: one of :data:`TYPES`.
        order: int64 ``[N]``: row ``i`` of the result is row ``order[i]`` of the file. None for the same.
        layer: a name for messages.

    Raises:
        NonFiniteWeightError: a step or a minimum is NaN or infinite.
    """
    kind = TYPES[type_name]
    rows, blocks = data.size(0), data.size(1) // kind.nbytes
    groups = blocks * kind.columns // kind.group_size

    def chosen(part: slice) -> Tensor:
        return (data[part] if order is None else data[order[part]]).reshape(-1, kind.nbytes)

    def codes(part: slice) -> Tensor:
        return kind.codes(chosen(part)).reshape(-1, blocks * kind.columns)

    step, minimum = kind.grids(chosen(slice(None)))
    minimum = None if minimum is None else minimum.reshape(rows, groups)
    shape = (rows, blocks * kind.columns, kind.bits, kind.group_size)
    return CodedWeight(codes, *shape, step.reshape(rows, groups), minimum=minimum).packed(layer)
