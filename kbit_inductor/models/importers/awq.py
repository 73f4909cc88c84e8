"""AWQ's safetensors in the layout of its GEMM kernels, which AutoAWQ and GPTQModel write (``quant_method: awq``).

Of a layer ``[N, K]`` with ``G`` groups of columns there are ``qweight`` int32 ``[K, N / 8]`` and ``qzeros`` int32 ``[G, N / 8]``,
words of eight codes of 4 bits, and ``scales`` ``[G, N]``. The codes of a word belong to the rows 0, 2, 4, 6, 1, 3, 5, 7 of eight,
from the lowest bits up: so the kernels unpack two at a time. A value is ``scale * (code - zero)``. (Lin et al., "AWQ", 2023;
AutoAWQ, ``packing_utils.py``.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.errors import CorruptModelError, UnsupportedFormatError
from kbit_inductor.kernels.layout import group_count
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.importers.fields import unpack_fields
from kbit_inductor.models.importers.tensors import FLOATS, Layer

MARKS = ("qweight",)
BITS, FIELDS = 4, 8
FIELD_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)


def read(layer: Layer, rows: int, columns: int) -> CodedWeight:
    """The weight of ``layer``.

    Raises:
        CorruptModelError: its tensors do not fit each other, or the layer.
        UnsupportedFormatError: the layout of other kernels, or other than 4 bits.
    """
    version, bits = layer.option("version", str, "gemm").lower(), layer.option("bits", int, layer.options.get("w_bit", BITS))
    if version != "gemm" or bits != BITS:
        raise UnsupportedFormatError(f"{layer.name} is of {bits} bits for the kernels {version!r}; 4 bits for 'gemm' are read")
    group_size = layer.option("group_size", int, layer.options.get("q_group_size", -1))
    group_size = columns if group_size < 1 else group_size
    if rows % FIELDS:
        raise CorruptModelError(f"{layer.name} has {rows} rows, no multiple of {FIELDS}; copy the folder anew")
    groups = group_count(columns, group_size)
    words = layer.get("qweight", (torch.int32,), (columns, rows // FIELDS))
    zero = _rows(layer.get("qzeros", (torch.int32,), (groups, rows // FIELDS)), slice(0, rows))
    scale = layer.get("scales", FLOATS, (groups, rows))
    return CodedWeight(lambda part: _rows(words, part), rows, columns, BITS, group_size, scale.t().double(), zero.double())


def _rows(words: Tensor, part: slice) -> Tensor:
    """Rows ``part`` of the transpose of ``words`` ``[K, N / 8]``, uint8 ``[R, K]``."""
    first, end = part.start // FIELDS, -(-part.stop // FIELDS)
    codes = unpack_fields(words[:, first:end], BITS, FIELDS * (end - first)).unflatten(1, (-1, FIELDS))[..., list(FIELD_OF_ROW)]
    rows: Tensor = codes.flatten(1)[:, part.start - FIELDS * first : part.stop - FIELDS * first].t()
    return rows
