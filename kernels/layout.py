"""The storage layout of k-bit codes: bit planes, independent of the device.

A weight of ``N`` rows and ``K`` columns with ``k``-bit codes is stored as ``planes``, a contiguous uint8 tensor of shape
``[k, N, ceil(K / 8)]``. Plane 0 holds the most significant bit of every code, so the first ``j`` planes are the ``j`` leading
bits. Byte ``b`` of a row holds columns ``8 b .. 8 b + 7``, column ``8 b + i`` in bit ``i``. Columns past ``K`` are zero.

The values come back by an affine map per group of ``group_size`` columns::

    w[n, c] = (scale[n, g] * level[n, c] + offset[n, g]) * global_scale        g = c // group_size

The level is the code itself, or ``codebook[code]`` where the weight has a ``codebook``: uint8 ``[2 ** k]``, ascending. Codebooks
have 2 to 7 bits: any two levels are a scale and an offset, and the 256 levels of 8 bits could only be 0 to 255.

``scale`` and ``offset`` are float16 ``[N, G]``, ``G = ceil(K / group_size)``; ``global_scale`` is float32 ``[1]``, a power of two
that keeps both inside float16's range whatever the magnitude of the weight. ``offset=None`` stands for the symmetric grid
``offset = -scale * midpoint``. In a **cascade** both are ``[k, N, G]``: the first ``j`` planes are the weight of ``j`` bits, whose
scales and offsets are row ``j - 1``. The map holds GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 blocks exactly.

Bit planes as the storage of quantized weights: Zhu et al., "DoReFa-Net" (2016), and Park et al., "Any-Precision LLM" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 8
TILED_LAYOUTS = ("tiled", "vectors")
"""Layouts of the CPU kernels (``cpu/tiled.h``), one uint8 tensor each: codes in quads, and codes as bit vectors."""
FP8 = -8
"""The ``activation_bits`` of 8-bit floats (e4m3 of the OCP, 4 exponent and 3 mantissa bits), with one scale for each row."""
WORD_COLUMNS = 32
"""Columns in a word of a bit vector, at which every group begins one."""

LOWEST_BITS = sum(1 << 8 * i for i in range(8))
"""Of the bytes of a word: of int64, little-endian."""
TO_HIGHEST_BYTE = sum(1 << 56 - 7 * i for i in range(8))
BIT_OF_EACH_BYTE = sum(1 << 9 * i for i in range(8)) - (1 << 64)  # as a signed number
CARRY = sum(0x80 - (1 << i) << 8 * i for i in range(8))


def midpoint(bits: int) -> float:
    """The level that means zero in a symmetric grid of levels of ``bits`` (:func:`level_bits`): ``2 ** (bits - 1)``, or one half at
    1 bit, where the values are ±scale/2."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


def level_bits(bits: int, codebook: bool) -> int:
    """Bits of the levels that codes of ``bits`` stand for."""
    return MAX_BITS if codebook else bits


def takes_codebook(bits: int) -> bool:
    """Whether levels of their own can say more than the codes: at 2 to 7 bits."""
    return 1 < bits < MAX_BITS


def packed_width(columns: int) -> int:
    """Bytes that one row of one plane takes."""
    return -(-columns // 8)


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row of ``columns``; the last one may be partial."""
    return -(-columns // group_size)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``codes`` of shape ``[N, K]``, each below ``2 ** bits``, into planes ``[bits, N, ceil(K / 8)]``.

    Eight codes are a word. A product moves a bit of each of its bytes to the highest byte (Warren, "Hacker's Delight", 2012,
    section 7-3): that of byte ``i``, by ``56 - 7 * i`` places, to bit ``i`` there, and no two terms of the product meet.
    """
    rows, columns = codes.shape
    width = packed_width(columns)
    padded = torch.nn.functional.pad(codes, (0, 8 * width - columns))
    words = padded.flatten().view(torch.int64).view(rows, width)
    planes = torch.empty(bits, rows, width, dtype=torch.uint8, device=codes.device)
    for plane in range(bits):
        planes[plane] = ((words >> (bits - 1 - plane)) & LOWEST_BITS).mul_(TO_HIGHEST_BYTE) >> 56
    return planes


def unpack_codes(planes: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 codes ``[N, columns]``.

    A byte is repeated eight times in a word, of which byte ``i`` keeps bit ``i``; what is added carries that to its byte's highest
    bit.
    """
    _, rows, width = planes.shape
    words = torch.zeros(rows, width, dtype=torch.int64, device=planes.device)
    for plane in planes:
        kept = plane.long().mul_(LOWEST_BITS).bitwise_and_(BIT_OF_EACH_BYTE)
        words = words.bitwise_left_shift_(1).bitwise_or_(kept.add_(CARRY).bitwise_right_shift_(7).bitwise_and_(LOWEST_BITS))
    return words.view(torch.uint8)[:, :columns]


def tiled_nbytes(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    codebook: bool = False,
    vectors: bool = False,
    cascade: bool = False,
) -> int:
    """Bytes of a weight in the layout of the CPU kernels (``cpu/tiled.h``): 16 rows to a block, 4 columns to a quad, or with
    ``vectors`` 32 columns of a bit to a word; with ``cascade`` a grid for every number of planes."""
    groups = group_count(columns, group_size)
    unit = WORD_COLUMNS if vectors else 4
    units = (groups - 1) * -(-group_size // unit) + -(-(columns - (groups - 1) * group_size) // unit) if groups else 0
    grid = groups * 16 * 2 * (1 if symmetric else 2) * (bits if cascade else 1)
    if vectors:
        grid = -(-grid // 64) * 64
    levels = max(64, 2**bits) if codebook else 0
    return 64 + levels + -(-rows // 16) * (-(-(grid + units * unit * 2 * bits) // 64) * 64) + 64
