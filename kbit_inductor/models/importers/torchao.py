"""A model that torchao has quantized, whose weights are tensor subclasses, on packed modules: in memory, in place.

torchao's portable forms are read: ``IntxUnpackedToInt8Tensor`` (``IntxWeightOnlyConfig``: 1 to 8 bits in groups of columns, one
code to a byte) and ``Int8Tensor`` (``Int8WeightOnlyConfig``). A value is ``scale * (qdata - zero_point)``. Its other forms of int4
have the layout of one kernel each. (torchao, ``quantization/quantize_/workflows``.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.errors import UnsupportedFormatError
from kbit_inductor.logs import logger
from kbit_inductor.models import filling
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.models.surgery import packed_module

log = logger("pack")
READ = ("IntxUnpackedToInt8Tensor", "Int8Tensor")


@torch.no_grad()
def from_torchao(model: nn.Module, *, exact: bool = True) -> nn.Module:
    """Swap every ``nn.Linear`` of ``model`` whose weight torchao has quantized for a packed module of the same codes, in place.

    Args:
        model: on a CPU, after torchao's ``quantize_``. It may not be a linear layer itself, since it is changed in place.
        exact: as for :func:`kbit_inductor.from_checkpoint`.

    Raises:
        UnsupportedFormatError: a weight of another of torchao's forms; the model is as it was.
        NonFiniteWeightError: a scale is NaN or infinite.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and _is_torchao(module.weight)}
    coded = {name: _coded(name, module.weight) for name, module in found.items()}
    rounded: dict[str, float] = {}
    for name, weight in coded.items():
        module = found[name]
        packed = weight.packed(name, exact=exact)
        matrix = PackedMatrix(packed, weight.rows, module.weight.dtype)
        model.set_submodule(name, packed_module(module, matrix).train(module.training))
        rounded |= {name: packed.error} if packed.error else {}
    filling.tell_rounded(rounded, type(model).__name__)
    return model


def _is_torchao(weight: Any) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _coded(name: str, weight: Any) -> CodedWeight:
    kind = type(weight).__name__
    if kind not in READ:
        raise UnsupportedFormatError(f"layer {name!r} has a {kind} of torchao; {' and '.join(READ)} are read")
    rows, columns = weight.qdata.shape
    bits = int(str(weight.target_dtype).removeprefix("torch.int")) if kind == READ[0] else 8
    group_size = int(weight.block_size[1])
    if weight.block_size[0] != 1 or getattr(weight, "act_pre_scale", None) is not None:
        raise UnsupportedFormatError(
            f"layer {name!r} has blocks of {tuple(weight.block_size)}, or scaled inputs; groups of a row are read"
        )
    values, low = weight.qdata, 2 ** (bits - 1)
    grid: tuple[Tensor | None, ...] = (weight.scale, weight.zero_point)
    scale, zero = (None if numbers is None else numbers.double().reshape(rows, -1) for numbers in grid)
    assert scale is not None

    def codes(part: slice) -> Tensor:
        found: Tensor = values[part].int() + low
        return found.to(torch.uint8)

    return CodedWeight(codes, rows, columns, bits, group_size, scale, None if zero is None else zero + low)
