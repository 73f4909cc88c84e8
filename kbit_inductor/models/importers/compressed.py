"""Weights of compressed-tensors (``quant_method: compressed-tensors``), integers of any width: W4A16, W8A16 and the like.

Of a layer ``[N, K]`` with ``G`` groups of columns, or one for each row, there are in the format ``pack-quantized``, in words of 32
bits (:mod:`.fields`), ``weight_packed`` int32 ``[N, K * bits / 32]`` and for asymmetric grids ``weight_zero_point`` int32 ``[N *
bits / 32, G]``, whose stream runs down the rows; ``weight_scale`` ``[N, G]``; ``weight_shape`` ``[2]``; and where columns were
reordered ``weight_g_idx`` int32 ``[K]``. In the formats ``int-quantized`` and ``naive-quantized`` there are ``weight`` and
``weight_zero_point`` as int8. A value is ``scale * (code - zero)``, with codes and zero points from ``-2 ** (bits - 1)`` on, which
packed ones have added. (compressed-tensors, ``compressors/pack_quantized``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.errors import UnsupportedFormatError
from kbit_inductor.kernels.layout import MAX_BITS, group_count
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.importers.fields import unpack_fields, word_count
from kbit_inductor.models.importers.gptq import column_order
from kbit_inductor.models.importers.tensors import FLOATS, Layer, as_kind

MARKS = ("weight_packed", "weight_scale")
BYTES = 8


def read(layer: Layer, rows: int, columns: int) -> CodedWeight:
    """The weight of ``layer``.

    Raises:
        CorruptModelError: its tensors do not fit each other, or the layer.
        UnsupportedFormatError: the weights are no integers, or share scales otherwise than by groups of columns of a row.
    """
    packed = "weight_packed" in layer
    scale = layer.get("weight_scale", FLOATS)
    told = _scheme(layer, packed)
    bits = as_kind(int, told.get("num_bits"), f"num_bits of {layer.name}")
    if told.get("type", "int") != "int" or not 1 <= bits <= MAX_BITS or told.get("strategy") not in ("group", "channel", None):
        raise UnsupportedFormatError(f"{layer.name} is of {bits} bits, {told}; integers in groups of columns or rows are read")
    size = told.get("group_size")
    group_size = size if isinstance(size, int) and size > 0 else columns
    groups = group_count(columns, group_size)
    scale = layer.get("weight_scale", FLOATS, (rows, groups))
    order = column_order(layer, "weight_g_idx", columns, group_size)
    codes = _packed_codes(layer, rows, columns, bits) if packed else _plain_codes(layer, rows, columns, bits)

    def ordered(part: slice) -> Tensor:
        found: Tensor = codes(part)
        return found if order is None else found.index_select(1, order)

    zero = _zero(layer, rows, groups, bits, packed)
    return CodedWeight(ordered, rows, columns, bits, group_size, scale.double(), zero, order=order)


def _packed_codes(layer: Layer, rows: int, columns: int, bits: int) -> Any:
    words = layer.get("weight_packed", (torch.int32,), (rows, word_count(columns, bits)))
    return lambda part: unpack_fields(words[part], bits, columns)


def _plain_codes(layer: Layer, rows: int, columns: int, bits: int) -> Any:
    values = layer.get("weight", (torch.int8,), (rows, columns))
    return lambda part: (values[part].int() + 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8)


def _zero(layer: Layer, rows: int, groups: int, bits: int, packed: bool) -> Tensor | None:
    """The zero points as levels, float64 ``[N, G]``; None for the middle."""
    if "weight_zero_point" not in layer:
        return None
    if packed:
        words = layer.get("weight_zero_point", (torch.int32,), (word_count(rows, bits), groups))
        return unpack_fields(words.t(), bits, rows).t().double()
    stored: Tensor = layer.get("weight_zero_point", (torch.int8,), (rows, groups)).double()
    return stored.add(2 ** (bits - 1))


def _scheme(layer: Layer, packed: bool) -> Mapping[str, Any]:
    """What is said of the weights: of the one group of the configuration whose width the layer has."""
    schemes = [
        as_kind(dict, group.get("weights") or {}, "weights of a group")
        for group in as_kind(dict, layer.options.get("config_groups"), "config_groups").values()
        if isinstance(group, dict)
    ]
    if len(schemes) != 1:
        raise UnsupportedFormatError(f"{layer.name} is one of {len(schemes)} groups of layers; one group is read")
    formats = ("pack-quantized",) if packed else ("int-quantized", "naive-quantized")
    if layer.options.get("format") not in (*formats, None):
        raise UnsupportedFormatError(
            f"{layer.name} is of the format {layer.options.get('format')!r}; {' and '.join(formats)} are read"
        )
    return dict(schemes[0])
