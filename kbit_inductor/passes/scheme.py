"""Which nodes dequantize constant codes, or round a weight to a grid: PT2E's graphs, and fake quantization."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from kbit_inductor.given_grid import GivenGrid
from kbit_inductor.kernels.layout import MAX_BITS
from kbit_inductor.passes.patterns import value_of

# The positions of scale, zero point, axis, least and largest code, and group size; None for what is not there.
PLACES: Mapping[str, tuple[int, int, int | None, int, int, int | None]] = {
    "quantized_decomposed.dequantize_per_tensor": (1, 2, None, 3, 4, None),
    "quantized_decomposed.dequantize_per_channel": (1, 2, 3, 4, 5, None),
    "quantized_decomposed.dequantize_per_channel_group": (1, 2, None, 3, 4, 6),
    "fake_quantize_per_tensor_affine": (1, 2, None, 3, 4, None),
    "fake_quantize_per_channel_affine": (1, 2, 3, 4, 5, None),
}
OVERLOADS = (".default", ".tensor", ".tensor2", ".tensor_qparams")


def grid_of(node: fx.Node) -> GivenGrid | None:
    """The grid that the values of ``node`` lie on, if it is one of these nodes with at most 8 bits and a scale for whole rows."""
    places = PLACES.get(_name(node))
    if places is None or node.kwargs.keys() - {"out_dtype"}:
        return None
    scale, zero, axis, low, high, group = (None if place is None else node.args[place] for place in places)
    if (axis or 0) != 0 or not isinstance(low, int) or not isinstance(high, int) or not 0 < high - low < 2**MAX_BITS:
        return None
    step, middle = _number(scale, node), _number(0 if zero is None else zero, node)
    group = -1 if group is None else group
    if step is None or middle is None or not isinstance(group, int) or (group < 1 and group != -1):
        return None
    return GivenGrid(step[0], middle[0], step[1], middle[1], low, high, group)


def _name(node: fx.Node) -> str:
    name = str(node.target) if hasattr(node.target, "op") or hasattr(node.target, "overloads") else ""
    for overload in OVERLOADS:
        name = name.removesuffix(overload)
    return name.removeprefix("aten.") or getattr(node.target, "__name__", "")


def _number(given: Any, node: fx.Node) -> tuple[float, bool] | None:
    """A number and False, or the position of a placeholder and True; None for anything else."""
    if isinstance(given, fx.Node):
        if given.op != "placeholder" or value_of(given) is None:
            return None
        return operator.indexOf(node.graph.find_nodes(op="placeholder"), given), True
    return (float(given), False) if isinstance(given, (int, float)) else None
