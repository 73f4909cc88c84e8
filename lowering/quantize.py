"""Compiled forms of quantizing and packing, where the library is there and takes the tensor. Neither is ever in a graph."""

from __future__ import annotations

from torch import Tensor

from kbit_inductor.kernels import layout
from kbit_inductor.lowering import ops, registry


def quantize_operator(weight: Tensor) -> ops.Operator | None:
    """``kbit::quantize_cpu`` if it can quantize ``weight``, else None: PyTorch then computes what defines it."""
    takes = weight.device.type == "cpu" and weight.dtype in registry.FLOATS
    return ops.overload("quantize", "_cpu") if takes and _is_compiled() else None


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """:func:`kbit_inductor.kernels.layout.pack_codes`, compiled where possible."""
    if codes.device.type == "cpu" and _is_compiled():
        planes: Tensor = ops.overload("pack_codes", "_cpu")(codes, bits)
        return planes
    return layout.pack_codes(codes, bits)


def _is_compiled() -> bool:
    return registry._cpu_library_problem() is None
