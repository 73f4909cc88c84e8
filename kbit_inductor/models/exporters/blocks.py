"""Packed weights as blocks of GGUF, where a block type holds the very same values.

A type has 32 columns with a float16 step, and codes of 4, 5 or 8 bits: with the middle one for zero (Q4_0, Q5_0, Q8_0), or with a
float16 minimum (Q4_1, Q5_1). So a group of ours may be any multiple of 32 columns, fewer bits go into more, and levels of a
codebook, which are bytes, into Q8_0. (llama.cpp, ``ggml-common.h``.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.config import LayerConfig
from kbit_inductor.kernels.layout import level_bits, midpoint, unpack_codes
from kbit_inductor.packing import PackedWeight, plane_operands

BLOCK = 32  # columns
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}  # of a block
ROWS_AT_ONCE = 4096


def block_type(packed: PackedWeight) -> str | None:
    """The type that holds ``packed``, in the layout "planes", exactly; None where none does."""
    config, columns = packed.config, packed.columns
    group_size = config.group_columns(columns)
    if packed.side is not None or columns % BLOCK or (group_size % BLOCK and group_size != columns) or not columns:
        return None
    present = [numbers for numbers in _grid(packed) if numbers is not None]
    exact = all(torch.equal(numbers.half().double(), numbers) for numbers in present)
    return _type_of(config) if exact else None


def _type_of(config: LayerConfig) -> str | None:
    bits = level_bits(config.bits, bool(config.levels()))
    if config.symmetric and bits > 1:
        return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"
    return "Q4_1" if bits <= 4 else "Q5_1" if bits == 5 else None


def to_blocks(packed: PackedWeight, kind: str) -> Tensor:
    """The rows of ``packed`` as blocks of ``kind``, its :func:`block_type`: uint8 ``[N, bytes of a row]``."""
    planes, _, _, _, codebook = plane_operands(packed.operands, packed.config)
    scale, offset = _grid(packed)
    blocks = packed.columns // BLOCK
    repeated = packed.config.group_columns(packed.columns) // BLOCK
    headers = [numbers.half().repeat_interleave(repeated, 1)[:, :blocks] for numbers in (scale, offset) if numbers is not None]
    middle = 0.0 if offset is not None else midpoint(level_bits(packed.config.bits, codebook is not None))
    shift = 0 if offset is not None else 2 ** (BITS[kind] - 1) - int(middle)
    parts = []
    for start in range(0, planes.size(1), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        codes = unpack_codes(planes[:, part], packed.columns)
        levels = (codes if codebook is None else codebook[codes.int()]) + shift
        fields = _encoded(levels.reshape(-1, BLOCK), kind)
        halves = [header[part].reshape(-1, 1).contiguous().view(torch.uint8) for header in headers]
        parts.append(torch.cat([*halves, fields], 1).view(codes.size(0), -1))
    return torch.cat(parts)


def _grid(packed: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """Steps and values of level 0, float64 ``[N, G]``; the latter None where the middle level means zero in the file too."""
    _, scale, offset, unit, _ = plane_operands(packed.operands, packed.config)
    step = scale.double() * unit
    if offset is None:
        return step, -step / 2 if level_bits(packed.config.bits, bool(packed.config.levels())) == 1 else None
    return step, offset.double() * unit


def _encoded(codes: Tensor, kind: str) -> Tensor:
    """Codes ``[B, 32]`` as bytes: the fifth bits, and then nibbles, lower halves first; or bytes with a sign."""
    if BITS[kind] == 8:
        return codes ^ 128
    nibbles = codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4
    if BITS[kind] == 4:
        return nibbles
    weights = (2 ** torch.arange(8)).to(torch.uint8)
    fifth = ((codes >> 4).view(-1, 4, 8) * weights).sum(-1, dtype=torch.uint8)
    return torch.cat([fifth, nibbles], 1)
