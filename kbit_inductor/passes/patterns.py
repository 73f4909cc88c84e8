"""What a node of a graph of Dynamo's or of torch.export computes, however it is spelled: activations, casts, attention.

Nothing here changes a graph but :func:`erase_dead`; :mod:`kbit_inductor.passes.fuse` and ``epilogue`` do.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor.capture import VALUE

aten = torch.ops.aten
FEW_QUERIES = 8  # a decoding step; with more that are of half precision and look everywhere PyTorch is as fast
ADD = (operator.add, operator.iadd, torch.add, "add", aten.add.Tensor)
MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", aten.mul.Tensor)
DIVIDE = (operator.truediv, torch.div, torch.true_divide, "div", aten.div.Tensor)
CASTS = ("to", "float", "bfloat16", "half", "type", "type_as", torch.Tensor.to, aten._to_copy.default, aten.to.dtype)
ACTIVATIONS = {
    "silu": (functional.silu, aten.silu.default),
    "relu": (functional.relu, torch.relu, "relu", aten.relu.default),
    "sigmoid": (torch.sigmoid, functional.sigmoid, "sigmoid", aten.sigmoid.default),
    "tanh": (torch.tanh, functional.tanh, "tanh", aten.tanh.default),
}
LINEARS = (functional.linear, aten.linear.default)
DROPOUTS = (functional.dropout, torch.dropout, aten.dropout.default)
GELU = (functional.gelu, aten.gelu.default)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def value_of(node: Any) -> Tensor | None:
    """The fake tensor of ``node``, or None when it is no node or no tensor."""
    value = node.meta.get(VALUE) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def attention_arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments of ``attention_cpu`` that give what the scaled dot product ``node`` gives, or None."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (value_of(given.get(name)) for name in names[:3])
    if query is None or key is None or value is None or given.get("dropout_p"):
        return None
    mask = given.get("attn_mask")
    if not _fits(query, key, value, bool(given.get("enable_gqa")), bool(given.get("is_causal"))):
        return None
    if mask is not None and ((found := value_of(mask)) is None or found.dtype not in (torch.bool, query.dtype)):
        return None
    scale = query.shape[3] ** -0.5 if given.get("scale") is None else given["scale"]
    operands = given["query"], given["key"], given["value"], mask, scale
    return (*operands, True) if given.get("is_causal") else operands


def _fits(query: Tensor, key: Tensor, value: Tensor, shares_keys: bool, causal: bool) -> bool:
    """Whether the operator takes these: heads and their sizes are known, and it is the faster way."""
    tensors = (query, key, value)
    if any(t.dim() != 4 or t.device.type != "cpu" or t.dtype != query.dtype or t.dtype not in FLOATS for t in tensors):
        return False
    if any(not isinstance(t.shape[i], int) for t in tensors for i in (1, 3)) or key.shape[1] != value.shape[1]:
        return False
    few = isinstance(query.shape[2], int) and query.shape[2] <= FEW_QUERIES
    return (few or causal or query.dtype == torch.float32) and (shares_keys or query.shape[1] == key.shape[1])


def activation_of(node: Any) -> str | None:
    """The name by which ``fused_linear_cpu`` knows the activation that ``node`` computes, or None."""
    if not isinstance(node, fx.Node) or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    if node.target in GELU:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    names = [name for name, targets in ACTIVATIONS.items() if node.target in targets and not node.kwargs.get("inplace")]
    return names[0] if names else None


def cast_of(node: Any) -> fx.Node | None:
    """What ``node`` casts from a float to another one, if that is all that it does."""
    if not isinstance(node, fx.Node) or node.target not in CASTS or not isinstance(node.args[0], fx.Node):
        return None
    value, source = value_of(node), value_of(node.args[0])
    if value is None or source is None or value.dtype == source.dtype or not {value.dtype, source.dtype} <= set(FLOATS):
        return None
    same = alike(node, node.args[0], dtypes=False) and value.stride() == source.stride()
    return node.args[0] if same and is_constant(node) else None


def is_number(operand: Any) -> bool:
    """Whether ``operand`` is a node that gives a float."""
    return isinstance(operand, fx.Node) and isinstance(operand.meta.get(VALUE), torch.SymFloat)


def number_of(operand: Any) -> float | None:
    """The float that ``operand`` is, if it is one.

    With ``dynamic=True`` Dynamo takes a module's floats, as the epsilon of a norm, for inputs that may change. One that is asked
    for here is guarded: should it change, the model is compiled anew.
    """
    value = operand.meta[VALUE] if is_number(operand) else operand
    return float(value) if isinstance(value, (float, torch.SymFloat)) else None


def is_off(dropout: fx.Node) -> bool:
    """Whether the call ``dropout`` gives its input."""
    training = dropout.args[2] if len(dropout.args) > 2 else dropout.kwargs.get("training", dropout.kwargs.get("train", True))
    return training is False and bool(dropout.args)


def alike(a: Any, b: Any, dtypes: bool = True) -> bool:
    """Whether both are tensors of the same shape, device and, with ``dtypes``, dtype."""
    x, y = value_of(a), value_of(b)
    if x is None or y is None:
        return False
    if dtypes and x.dtype != y.dtype:
        return False
    return x.device == y.device and x.dim() == y.dim() and all(map(_same, x.shape, y.shape))


def is_float_product(node: Any) -> bool:
    """Whether ``node`` multiplies by a matrix in float: once weights are packed, a side term, or a layer that was left."""
    return isinstance(node, fx.Node) and node.target in LINEARS


def is_constant(node: Any) -> bool:
    """Whether ``node`` is a tensor that nothing in the graph writes to: a call that reads it may then move.

    In-place operations raise the version of the fake tensors that Dynamo ran them on. A node without a value, a step of a product
    in an unusual spelling, is taken for written.
    """
    value = value_of(node)
    return value is not None and value._version == 0


def hoisted_bias(graph: fx.Graph, bias: Any) -> bool:
    """Whether ``bias`` is there before all products: none, an input, or a sum of inputs, which is moved to where they end."""
    if bias is None or bias.op == "placeholder":
        return bias is None or is_constant(bias)
    operands = bias.all_input_nodes
    if bias.target not in ADD or not all(each.op == "placeholder" and is_constant(each) for each in operands):
        return False
    graph.find_nodes(op="placeholder")[-1].append(bias)
    return is_constant(bias)


def _same(a: Any, b: Any) -> bool:
    return a is b or str(a) == str(b)  # without a guard on symbolic sizes


def unsliced(node: Any) -> Any:
    """What ``node`` takes slices of, when they keep all of it: the last of one token, for instance."""
    while isinstance(node, fx.Node) and node.target is operator.getitem and is_constant(node):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if not all(isinstance(each, slice) and each.step in (None, 1) for each in index) or not alike(node, node.args[0]):
            break
        node = node.args[0]
    return node


def erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Erase ``node`` and what only it used, if nothing uses it."""
    if node.users or node.op not in ("call_function", "call_method"):
        return
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        erase_dead(graph, operand)
