"""GPTQ's safetensors, as AutoGPTQ, GPTQModel and optimum write them (``quant_method: gptq``).

Of a layer ``[N, K]`` with ``G`` groups of columns there are, in words of 32 bits (:mod:`.fields`):

* ``qweight`` int32 ``[K * bits / 32, N]``: the codes, columns along the stream;
* ``qzeros`` int32 ``[G, N * bits / 32]``: the zero points. The older convention, ``checkpoint_format`` ``"gptq"``, stores them
  less one; ``"gptq_v2"`` as they are. GPTQModel takes the ones from a whole word, so that a zero point of 0 borrows from the next
  field of its word, and gives them back to the whole word, as is done here;
* ``scales`` ``[G, N]``;
* ``g_idx`` int32 ``[K]``: the group of each column. With ``desc_act`` columns were quantized in the order of their importance, and
  those of a group are not neighbours.

A value is ``scale * (code - zero)``. (Frantar et al., "GPTQ", 2022; AutoGPTQ, ``qlinear_cuda_old.py``; GPTQModel,
``utils/model.py``.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.errors import CorruptModelError, UnsupportedFormatError
from kbit_inductor.kernels.layout import MAX_BITS, group_count
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.importers.fields import unpack_fields, word_count
from kbit_inductor.models.importers.tensors import FLOATS, Layer

MARKS = ("qweight",)
INT32 = (torch.int32,)
LESS = {"gptq": 1, "gptq_v2": 0}  # than a zero point is what is stored of it, by the checkpoint_format
WORD = 32  # bits


def read(layer: Layer, rows: int, columns: int) -> CodedWeight:
    """The weight of ``layer``.

    Raises:
        CorruptModelError: its tensors do not fit each other, or the layer.
        UnsupportedFormatError: a layout other than the two above, or groups of different sizes.
    """
    style = layer.option("checkpoint_format", str, "gptq")
    if style not in LESS:
        raise UnsupportedFormatError(f"{layer.name} is of the checkpoint_format {style!r}; {' and '.join(LESS)} are read")
    words = layer.get("qweight", INT32)
    bits = _bits(layer, words, columns)
    words = layer.get("qweight", INT32, (word_count(columns, bits), rows))
    scale = layer.get("scales", FLOATS)
    group_size = _group_size(layer, scale, columns)
    groups = group_count(columns, group_size)
    scale = layer.get("scales", FLOATS, (groups, rows))
    zero = _zero_points(layer.get("qzeros", INT32, (groups, word_count(rows, bits))), bits, rows, LESS[style])
    order = column_order(layer, "g_idx", columns, group_size)

    def codes(part: slice) -> Tensor:
        found = unpack_fields(words[:, part].t(), bits, columns)
        return found if order is None else found[:, order]

    return CodedWeight(codes, rows, columns, bits, group_size, scale.t().double(), zero.t().double(), order=order)


def _zero_points(words: Tensor, bits: int, rows: int, less: int) -> Tensor:
    """Zero points, uint8 ``[G, N]``, which ``words`` has ``less`` so many."""
    if WORD % bits:  # a field goes on in the next word: GPTQModel takes one from each by itself
        fields: Tensor = unpack_fields(words, bits, rows).add(less) & (2**bits - 1)
        return fields
    ones = sum(less << place for place in range(0, WORD, bits))
    return unpack_fields(words + ones, bits, rows)


def column_order(layer: Layer, suffix: str, columns: int, group_size: int) -> Tensor | None:
    """Which columns to take in turn for those of a group to be neighbours, int32 ``[K]``; None where they are.

    Args:
        layer: with the group of each column, int32 ``[K]``, in the tensor ``suffix``, if it has any.
        suffix: a name.
        columns: K.
        group_size: of all groups but the last.

    Raises:
        UnsupportedFormatError: groups are of other sizes.
    """
    if suffix not in layer:
        return None
    group = layer.get(suffix, INT32, (columns,))
    order = group.argsort(stable=True)
    if bool((group < 0).all()):  # compressed-tensors' way to say that there is no order
        return None
    if not torch.equal(group[order], (torch.arange(columns) // group_size).int()):
        raise UnsupportedFormatError(f"{layer.name}.{suffix} has groups that are not of {group_size} columns each")
    return None if torch.equal(order, torch.arange(columns)) else order.int()


def _bits(layer: Layer, words: Tensor, columns: int) -> int:
    """What the option says, or for a layer with bits of its own, what the width of a row says."""
    bits: int
    for bits in (layer.option("bits", int), *range(1, MAX_BITS + 1)):
        if 1 <= bits <= MAX_BITS and words.dim() == 2 and words.size(0) == word_count(columns, bits):
            return bits
    raise CorruptModelError(
        f"{layer.name}.qweight is {tuple(words.shape)}, which fits no {columns} columns of 1 to {MAX_BITS} bits"
    )


def _group_size(layer: Layer, scale: Tensor, columns: int) -> int:
    """What the option says, or for a layer with groups of its own, what their number says."""
    told: int = layer.option("group_size", int, -1)
    groups = max(scale.size(0), 1) if scale.dim() else 1
    if 1 <= told <= columns and group_count(columns, told) == groups:
        return told
    return max(-(-columns // groups), 1)
