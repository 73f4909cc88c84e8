"""A graph that PT2E has quantized (torchao's ``convert_pt2e``) with packed modules for its products, in place.

In such a graph a weight is an int8 constant that ``dequantize_per_channel`` or ``dequantize_per_tensor`` turns to floats for a
linear operator. A value is ``scale * (code - zero_point)``, with one scale for each row or for all. Rounding of activations stays
in the graph as it is. (torchao, ``quantization/pt2e``.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kbit_inductor.logs import logger
from kbit_inductor.models import filling
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.modules import PackedLinear, PackedMatrix

log = logger("pack")
BY_ROW, BY_TENSOR = (f"quantized_decomposed.dequantize_per_{what}.default" for what in ("channel", "tensor"))
LINEAR = torch.ops.aten.linear.default


@torch.no_grad()
def from_pt2e(model: fx.GraphModule, *, exact: bool = True) -> fx.GraphModule:
    """Swap the linear operators of ``model`` on weights that PT2E has quantized for packed modules of the same codes, in place.

    Weights of other operators, convolutions for one, stay as they are. Constants that nothing uses any more are removed, floats of
    the weights among them.

    Args:
        model: what ``convert_pt2e`` returns, on a CPU.
        exact: as for :func:`kbit_inductor.from_checkpoint`.

    Raises:
        NonFiniteWeightError: a scale is NaN or infinite.
    """
    rounded: dict[str, float] = {}
    for node in list(model.graph.nodes):
        coded = _coded(model, node) if str(node.target) in (BY_ROW, BY_TENSOR) else None
        if coded is None:
            continue
        name = str(node.all_input_nodes[0].target)
        packed = coded.packed(name, exact=exact)
        matrix = PackedMatrix(packed, coded.rows, torch.float32)
        rounded |= {name: packed.error} if packed.error else {}
        for position, user in enumerate(list(node.users)):
            _swap(model, user, f"{name}_packed_{position}", matrix)
        model.graph.erase_node(node)
    _remove_unused(model)
    model.recompile()
    filling.tell_rounded(rounded, type(model).__name__)
    return model


def _coded(model: fx.GraphModule, node: fx.Node) -> CodedWeight | None:
    """The weight that ``node`` dequantizes; None where it is no int8 matrix with scales for rows, which linear operators use."""
    arguments: Any = node.args
    data, scale, zero, *rest = arguments
    axis, low, high = rest[:3] if str(node.target) == BY_ROW else (0, *rest[:2])
    values = _constant(model, data)
    if values is None or values.dtype != torch.int8 or values.dim() != 2 or axis != 0 or low >= 0:
        return None
    if not all(user.target is LINEAR and user.args[1] is node and user.args[0] is not node for user in node.users):
        return None
    rows, columns = values.shape
    bits = max(high.bit_length(), (-low - 1).bit_length()) + 1
    step, middle = (_numbers(model, told, rows) for told in (scale, zero))
    below = 2 ** (bits - 1)

    def codes(part: slice) -> Tensor:
        found: Tensor = values[part].int() + below
        return found.to(torch.uint8)

    return CodedWeight(codes, rows, columns, bits, max(columns, 1), step, middle + below)


def _numbers(model: fx.GraphModule, told: Any, rows: int) -> Tensor:
    """A number, or one for each row, as float64 ``[N, 1]``."""
    known = _constant(model, told)
    return torch.as_tensor(told if known is None else known).double().reshape(-1, 1).expand(rows, 1).contiguous()


def _constant(model: fx.GraphModule, node: object) -> Tensor | None:
    """The tensor that ``node`` gets from the module; None where it does not."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, key = str(node.target).rpartition(".")
    found = getattr(model.get_submodule(path), key)
    return found if isinstance(found, Tensor) else None


def _swap(model: fx.GraphModule, linear: fx.Node, name: str, matrix: PackedMatrix) -> None:
    """A packed module in the place of ``linear``."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    model.add_submodule(name, PackedLinear(matrix, None))
    with model.graph.inserting_before(linear):
        made = model.graph.call_module(name, (linear.args[0],))
        if bias is not None:
            made = model.graph.call_function(torch.ops.aten.add.Tensor, (made, bias))
    made.meta.update(linear.meta)
    linear.replace_all_uses_with(made)
    model.graph.erase_node(linear)


def _remove_unused(model: fx.GraphModule) -> None:
    model.graph.eliminate_dead_code()
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    for path, module in list(model.named_modules()):
        if isinstance(module, (PackedLinear, PackedMatrix)):
            continue
        for table in (module._parameters, module._buffers):
            for key in [key for key in table if f"{path}.{key}".removeprefix(".") not in used]:
                del table[key]
