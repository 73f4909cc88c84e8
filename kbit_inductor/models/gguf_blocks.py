"""Blocks of GGUF files as packed weights, code by code: nothing is quantized again.

A block is 32 columns of a row with a float16 step, and in the formats with a ``1`` at the end a float16 minimum. That is a group of
the storage format (docs/format.md), so the values are the same to the last bit. The K quants multiply a step of 8 or 6 bits with a
float16, which no float16 holds in general; they are not taken over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kbit_inductor.config import LayerConfig
from kbit_inductor.kernels.layout import pack_codes
from kbit_inductor.packing import PackedWeight

BLOCK = 32  # columns
ROWS_AT_ONCE = 4096


def nibbles(packed: Tensor) -> Tensor:
    """The codes ``[R, 32]`` of 16 bytes: first the lower halves of all, then the upper ones."""
    return torch.cat([packed & 15, packed >> 4], 1)


def fifth_bits(packed: Tensor) -> Tensor:
    """The bits ``[R, 32]`` of 4 bytes, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)


def four(data: Tensor) -> Tensor:
    """Codes of 4 bits."""
    return nibbles(data)


def five(data: Tensor) -> Tensor:
    """Codes of 5 bits: the highest ones of all come first."""
    return nibbles(data[:, 4:]) | fifth_bits(data[:, :4]) << 4


def eight(data: Tensor) -> Tensor:
    """Signed bytes, of which -128 is code 0."""
    return data ^ 128


# Name of the type: bits, whether there is a minimum, and how codes follow from the bytes after step and minimum.
TYPES: dict[str, tuple[int, bool, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (4, False, four),
    "Q4_1": (4, True, four),
    "Q5_0": (5, False, five),
    "Q5_1": (5, True, five),
    "Q8_0": (8, False, eight),
}


def packed_of(data: Tensor, type_name: str, order: Tensor | None = None) -> PackedWeight:
    """The packed weight of a tensor of a GGUF file.

    Args:
        data: uint8 ``[N, bytes of a row]``, whole blocks.
        type_name: one of :data:`TYPES`.
        order: int64 ``[N]``: row ``i`` of the result is row ``order[i]`` of the file. None for the same.
    """
    bits, has_minimum, decode = TYPES[type_name]
    rows = data.size(0)
    header = 4 if has_minimum else 2
    width = header + (4 if bits == 5 else 0) + (BLOCK if bits == 8 else BLOCK // 2)
    groups = data.size(1) // width
    columns = groups * BLOCK
    planes = torch.empty(bits, rows, columns // 8, dtype=torch.uint8)
    scale = torch.empty(rows, groups, dtype=torch.float16)
    offset = torch.empty_like(scale) if has_minimum else None
    for start in range(0, rows, ROWS_AT_ONCE):
        part = slice(start, min(start + ROWS_AT_ONCE, rows))
        blocks = (data[part] if order is None else data[order[part]]).reshape(-1, width)
        count = part.stop - part.start
        planes[:, part] = pack_codes(decode(blocks[:, header:]).reshape(count, columns), bits)
        scale[part] = _halves(blocks[:, :2]).view(count, groups)
        if offset is not None:
            offset[part] = _halves(blocks[:, 2:4]).view(count, groups)
    config = LayerConfig(bits, group_size=BLOCK, symmetric=not has_minimum)
    operands = (planes, scale, *(() if offset is None else (offset,)), torch.ones(1))
    return PackedWeight(operands, config, columns, 0.0)


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)
