"""AWQ's safetensors, as AutoAWQ and GPTQModel write them for three kinds of kernels (``quant_method: awq``).

Of a layer ``[N, K]`` with ``G`` groups of columns there are codes of 4 bits, eight to a word from the lowest bits up, and:

* ``gemm``: ``qweight`` int32 ``[K, N / 8]``, ``qzeros`` int32 ``[G, N / 8]`` and ``scales`` ``[G, N]``. The codes of a word belong
  to the rows 0, 2, 4, 6, 1, 3, 5, 7 of eight: so the kernels unpack two at a time.
* ``gemv``: ``qweight`` int32 ``[N, K / 8]``, ``qzeros`` int32 ``[N, W]`` and ``scales`` ``[N, 8 W]``, in order. ``W`` is as many
  words as the zero points of a row take, and more where groups are small.
* ``gemv_fast``: ``qweight`` int16 ``[N / 4, K]``: 64 columns of four rows lie together, and 32 columns of a row in the order of
  :data:`COLUMNS`. ``scales`` is float16 ``[8 W, N]``, and so is ``qzeros``: minus the scales times the zero points.

A value is ``scale * (code - zero)``, of ``gemv_fast`` ``scale * code + qzeros``. (Lin et al., "AWQ", 2023; AutoAWQ,
``packing_utils.py``, ``gemv.py`` and ``gemv_fast.py``.)
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
ROWS_TOGETHER, COLUMNS_TOGETHER = 4, 64
COLUMNS = tuple(torch.arange(32).view(4, 4, 2).transpose(0, 1).reshape(4, 4, 2).transpose(1, 2).flatten().tolist())
PLACES = tuple(COLUMNS.index(column) for column in range(32))
INT32, HALF = (torch.int32,), (torch.float16,)


def read(layer: Layer, rows: int, columns: int) -> CodedWeight:
    """The weight of ``layer``.

    Raises:
        CorruptModelError: its tensors do not fit each other, or the layer.
        UnsupportedFormatError: the layout of other kernels, or other than 4 bits.
    """
    told = next((layer.option(name, str) for name in ("version", "checkpoint_format", "format") if name in layer.options), "gemm")
    readers, bits = (
        {"gemm": _gemm, "gemv": _gemv, "gemv_fast": _gemv_fast},
        layer.option("bits", int, layer.options.get("w_bit", BITS)),
    )
    if told.lower() not in readers or bits != BITS:
        raise UnsupportedFormatError(
            f"{layer.name} is of {bits} bits for the kernels {told!r}; 4 bits for {', '.join(readers)} are read"
        )
    group_size = layer.option("group_size", int, layer.options.get("q_group_size", -1))
    if rows % FIELDS:
        raise CorruptModelError(f"{layer.name} has {rows} rows, no multiple of {FIELDS}; copy the folder anew")
    return readers[told.lower()](layer, rows, columns, columns if group_size < 1 else group_size)


def _gemm(layer: Layer, rows: int, columns: int, group_size: int) -> CodedWeight:
    groups = group_count(columns, group_size)
    words = layer.get("qweight", INT32, (columns, rows // FIELDS))
    zero = _rows(layer.get("qzeros", INT32, (groups, rows // FIELDS)), slice(0, rows))
    scale = layer.get("scales", FLOATS, (groups, rows))
    return CodedWeight(lambda part: _rows(words, part), rows, columns, BITS, group_size, scale.t().double(), zero.double())


def _rows(words: Tensor, part: slice) -> Tensor:
    """Rows ``part`` of the transpose of ``words`` ``[K, N / 8]``, uint8 ``[R, K]``."""
    first, end = part.start // FIELDS, -(-part.stop // FIELDS)
    codes = unpack_fields(words[:, first:end], BITS, FIELDS * (end - first)).unflatten(1, (-1, FIELDS))[..., list(FIELD_OF_ROW)]
    rows: Tensor = codes.flatten(1)[:, part.start - FIELDS * first : part.stop - FIELDS * first].t()
    return rows


def _gemv(layer: Layer, rows: int, columns: int, group_size: int) -> CodedWeight:
    groups, width = group_count(columns, group_size), _zero_words(columns, group_size)
    words = layer.get("qweight", INT32, (rows, -(-columns // FIELDS)))
    zero = unpack_fields(layer.get("qzeros", INT32, (rows, width)), BITS, groups)
    scale = layer.get("scales", FLOATS, (rows, FIELDS * width))[:, :groups]
    return CodedWeight(
        lambda part: unpack_fields(words[part], BITS, columns), rows, columns, BITS, group_size, scale.double(), zero.double()
    )


def _gemv_fast(layer: Layer, rows: int, columns: int, group_size: int) -> CodedWeight:
    if columns % COLUMNS_TOGETHER:
        raise CorruptModelError(f"{layer.name} has {columns} columns, no multiple of {COLUMNS_TOGETHER}; copy the folder anew")
    groups, shape = group_count(columns, group_size), (FIELDS * _zero_words(columns, group_size), rows)
    words = layer.get("qweight", (torch.int16,), (rows // ROWS_TOGETHER, columns))
    scale, minimum = (layer.get(name, HALF, shape)[:groups].t().double() for name in ("scales", "qzeros"))
    return CodedWeight(lambda part: _interleaved_rows(words, part), rows, columns, BITS, group_size, scale, minimum=minimum)


def _zero_words(columns: int, group_size: int) -> int:
    """``W``: for groups of under 128 columns a multiple of what 1024 columns take."""
    unit = max(1, 128 // group_size)
    return -(-group_count(columns, group_size) // (FIELDS * unit)) * unit


def _interleaved_rows(words: Tensor, part: slice) -> Tensor:
    """Rows ``part`` of ``words`` int16 ``[N / 4, K]``, uint8 ``[R, K]``."""
    first, end = part.start // ROWS_TOGETHER, -(-part.stop // ROWS_TOGETHER)
    data = words[first:end].contiguous().view(torch.uint8)
    fields = torch.stack([data & 15, data >> BITS], -1).view(end - first, -1, ROWS_TOGETHER, COLUMNS_TOGETHER)
    codes = fields.transpose(1, 2).reshape(ROWS_TOGETHER * (end - first), -1, len(PLACES))[..., list(PLACES)].flatten(1)
    return codes[part.start - ROWS_TOGETHER * first : part.stop - ROWS_TOGETHER * first]
