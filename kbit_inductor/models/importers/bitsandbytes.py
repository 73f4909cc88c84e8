"""Weights of bitsandbytes (``quant_method: bitsandbytes``): NF4 in blocks, and int8 rows.

Of a layer ``[N, K]`` in 4 bits there are ``weight`` uint8 ``[N * K / 2, 1]``, two codes to a byte, the first one above;
``weight.quant_map`` float32 ``[16]``, the levels; ``weight.absmax`` ``[N * K / blocksize]``, the largest magnitude of each block
of the row-major weight; and ``weight.quant_state.bitsandbytes__nf4``, JSON as bytes. With double quantization ``weight.absmax``
are codes themselves: ``nested_quant_map[code] * nested_absmax[block] + nested_offset``. A value is ``absmax * level``.

The storage format has levels of 8 bits: those of NF4 are rounded to 1/127, and magnitudes to float16. In 8 bits there are
``weight`` int8 ``[N, K]`` and ``SCB`` float32 ``[N]``, the largest magnitude of each row. (Dettmers et al., "LLM.int8()", 2022,
and "QLoRA", 2023.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.errors import CorruptModelError, UnsupportedFormatError
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.importers.tensors import Layer, as_kind
from kbit_inductor.quantizers import codebook

MARKS = ("weight.absmax", "SCB")
STATE = "weight.quant_state.bitsandbytes__"
FLOAT32, UINT8 = (torch.float32,), (torch.uint8,)
ZERO, MOST = 128, 127  # of the levels of 8 bits


def read(layer: Layer, rows: int, columns: int) -> CodedWeight:
    """The weight of ``layer``.

    Raises:
        CorruptModelError: its tensors do not fit each other, or the layer.
        UnsupportedFormatError: other levels than NF4's, or blocks that do not end with a row.
    """
    if "SCB" in layer:
        return _int8(layer, rows, columns)
    if f"{STATE}nf4" not in layer:
        raise UnsupportedFormatError(f"{layer.name} is of 4 bits and not of NF4; NF4 and int8 are read")
    state = _state(layer)
    block = as_kind(int, state.get("blocksize"), f"blocksize of {layer.name}")
    if block < 1 or columns % block or columns % 2:
        raise UnsupportedFormatError(f"{layer.name} has blocks of {block} values, which do not end with a row of {columns}")
    data = layer.get("weight", UINT8).reshape(-1)
    if data.numel() * 2 != rows * columns:
        raise CorruptModelError(f"{layer.name}.weight has {data.numel()} bytes for {rows} x {columns} codes; copy the folder anew")
    levels = layer.get("weight.quant_map", FLOAT32, (16,)).double() * MOST + ZERO
    if tuple(levels.round().tolist()) != codebook("nf", 4):
        raise UnsupportedFormatError(f"{layer.name}.weight.quant_map is not that of NF4")
    largest = _absmax(layer, state, rows * columns // block).view(rows, columns // block)
    data = data.view(rows, columns // 2)

    def codes(part: slice) -> Tensor:
        return torch.stack([data[part] >> 4, data[part] & 15], -1).flatten(1)

    return CodedWeight(codes, rows, columns, 4, block, largest / MOST, codebook="nf", levels=levels)


def _int8(layer: Layer, rows: int, columns: int) -> CodedWeight:
    values = layer.get("weight", (torch.int8,), (rows, columns))
    largest = layer.get("SCB", FLOAT32, (rows,)).double()
    return CodedWeight(
        lambda part: values[part].view(torch.uint8) ^ 128, rows, columns, 8, max(columns, 1), largest[:, None] / MOST
    )


def _state(layer: Layer) -> Mapping[str, Any]:
    data = layer.get(f"{STATE}nf4", UINT8)
    try:
        return dict(as_kind(dict, json.loads(bytes(data.tolist())), f"the quantization state of {layer.name}"))
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(f"{layer.name}.{STATE}nf4 is no JSON ({error}); copy the folder anew") from error


def _absmax(layer: Layer, state: Mapping[str, Any], blocks: int) -> Tensor:
    """The largest magnitude of each block, float64 ``[blocks]``."""
    if "weight.nested_absmax" not in layer:
        return layer.get("weight.absmax", FLOAT32, (blocks,)).double()
    size = as_kind(int, state.get("nested_blocksize"), f"nested_blocksize of {layer.name}")
    offset = as_kind(float, state.get("nested_offset"), f"nested_offset of {layer.name}")
    if size < 1 or not math.isfinite(offset):
        raise CorruptModelError(f"{layer.name} has nested blocks of {size} from {offset} on; copy the folder anew")
    codes = layer.get("weight.absmax", UINT8, (blocks,))
    scale = layer.get("weight.nested_absmax", FLOAT32, (-(-blocks // size),))
    table = layer.get("weight.nested_quant_map", FLOAT32, (256,))
    # In float32, as bitsandbytes does.
    absmax: Tensor = table[codes.int()] * scale[torch.arange(blocks) // size] + offset
    return absmax.double()
