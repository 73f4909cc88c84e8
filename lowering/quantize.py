"""The compiled form of quantizing, where the library is there and takes the tensor. It is never in a graph."""

from __future__ import annotations

from torch import Tensor

from kbit_inductor.lowering import ops, registry


def quantize_operator(weight: Tensor) -> ops.Operator | None:
    """``kbit::quantize_cpu`` if it can quantize ``weight``, else None: PyTorch then computes what defines it."""
    takes = weight.device.type == "cpu" and weight.dtype in registry.FLOATS
    return ops.overload("quantize", "_cpu") if takes and _is_compiled() else None


def _is_compiled() -> bool:
    return registry.cpu_library_problem() is None
