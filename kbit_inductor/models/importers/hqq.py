"""Weights of HQQ in safetensors (``quant_method: hqq``), in groups along the columns (``axis`` 1).

Of a layer ``[N, K]`` there are ``W_q``, the codes of all groups of the row-major weight, ``[groups, group_size]``, in uint8: 8 /
bits codes to a byte, that of the first share of the groups on top; or of 3 bits in int32, ten to a word. ``scale`` and ``zero``
are float, ``[groups, 1]``; ``nbits``, ``group_size``, ``axis`` and ``shape`` are tensors too. A value is ``scale * (code -
zero)``, and the zero point is any number: their product is rounded to float16. (Badri and Shaji, "Half-Quadratic Quantization",
2023; hqq, ``core/bitpack.py``.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.errors import CorruptModelError, UnsupportedFormatError
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.importers.tensors import FLOATS, Layer

MARKS = ("W_q",)
IN_A_WORD = {3: 10}  # codes; of other widths as many as fill a byte
NUMBERS = (torch.int32, torch.int64, torch.uint8)


def read(layer: Layer, rows: int, columns: int) -> CodedWeight:
    """The weight of ``layer``.

    Raises:
        CorruptModelError: its tensors do not fit each other, or the layer.
        UnsupportedFormatError: groups along the rows, or that do not end with a row, or scales that are quantized themselves.
    """
    bits, group_size, axis = (_number(layer, name) for name in ("nbits", "group_size", "axis"))
    group_size = group_size if group_size > 0 else columns
    if bits not in (1, 2, 3, 4, 8) or axis != 1 or group_size < 1 or columns % group_size or "scale" not in layer:
        raise UnsupportedFormatError(
            f"{layer.name} is of {bits} bits in groups of {group_size} along axis {axis} of {columns} columns; 1, 2, 3, 4 and 8 "
            "bits in groups along axis 1 are read, which end with a row and have float scales"
        )
    per_word = IN_A_WORD.get(bits, 8 // bits)
    groups = rows * columns // group_size
    words = layer.get("W_q", (torch.int32,) if bits == 3 else (torch.uint8,), (-(-groups // per_word), group_size))
    scale, zero = (layer.get(name, FLOATS, (groups, 1)).double().view(rows, -1) for name in ("scale", "zero"))
    in_row = columns // group_size

    def codes(part: slice) -> Tensor:
        group = torch.arange(part.start * in_row, part.stop * in_row)
        share, shift = group % words.size(0), (per_word - 1 - group // words.size(0)) * bits
        found: Tensor = words[share].int() >> shift[:, None] & (2**bits - 1)
        return found.to(torch.uint8).view(-1, columns)

    return CodedWeight(codes, rows, columns, bits, group_size, scale, zero)


def _number(layer: Layer, name: str) -> int:
    tensor = layer.get(name, NUMBERS)
    if tensor.numel() != 1:
        raise CorruptModelError(f"{layer.name}.{name} is {tuple(tensor.shape)} where one number is due; copy the folder anew")
    return int(tensor)
