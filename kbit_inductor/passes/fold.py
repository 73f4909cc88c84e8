"""Fold what scales and shifts each row of a product into its weight and bias: batch norms, LayerScale, constant numbers.

``norm(x @ W.T + b) = x @ (s W).T + (s b + t)`` (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2). ``s W`` is a weight that the graph computes from parameters, so
:mod:`kbit_inductor.passes.derive` computes it when it is packed, and again when a source changes. What is left at a call is the sum
of a bias, and activations or residual sums behind it can become part of the product. A number is folded only where such a one
follows, a residual sum (``x + linear(y) * 0.2``): a number alone is part of Inductor's next kernel anyway. So is a softcap,
``tanh(y / c) * c``, which is explained: the tanh of the CPU's kernels is exact to 1e-7, whatever its size, and c magnifies that.

What could be folded and is not, since the scale would get no gradient or the weight's floats would have to stay, is explained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor.capture import Context, GraphWeight
from kbit_inductor.passes.derive import ancestors, constant_nodes
from kbit_inductor.passes.patterns import (
    ACTIVATIONS,
    ADD,
    DIVIDE,
    LINEARS,
    MULTIPLY,
    is_constant,
    is_number,
    number_of,
    value_of,
)
from kbit_inductor.passes.values import infer_values

CONVOLUTIONS: dict[Any, int] = {
    torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3, functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3,
}  # fmt: skip
BATCH_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
SOFTCAP = "the softcap that follows is one kernel of Inductor's: the tanh that products end with is not exact enough for it near 0"
Call = Callable[..., fx.Node]
"""Adds a call to the graph."""
Scale = Callable[[Call], tuple[Any, Any]]
"""To the nodes of s and t, ``[N]``; s may be a number, and t is None for none."""


def fold(gm: fx.GraphModule, context: Context) -> None:
    """Rewrite each product whose result only a batch norm, a constant vector or a number reads, or say why not."""
    constants = constant_nodes(context)
    for node in list(context.graph.nodes):
        if node.target is not functional.batch_norm and node.target not in (*MULTIPLY, *DIVIDE):
            continue
        for product in node.all_input_nodes:
            weight = _weight_of(context, product, constants)
            if weight is not None and _is_softcap(node):
                context.explain(weight, SOFTCAP)
            scale = None if weight is None else _scale(node, product, constants)
            if weight is None or scale is None or not _are_fixed(_sources(node, product), constants):
                continue
            if obstacle := _obstacle(context, weight):
                context.explain(weight, f"not scaled by what follows, {_name(node)}: {obstacle}")
                continue
            _fold(context, node, product, scale)
            context.fusions["folded"] += 1
            infer_values(gm, context)
            constants = constant_nodes(context)
            break


def _weight_of(context: Context, product: fx.Node, constants: dict[fx.Node, Any]) -> GraphWeight | None:
    """What ``product`` multiplies by, if that will be packed and is of the product's dtype, and one node reads the product."""
    if len(product.users) != 1 or product.op != "call_function" or len(product.args) < 2 or "weight" in product.kwargs:
        return None
    node, value = product.args[1], value_of(product)
    if not isinstance(node, fx.Node) or node.op != "placeholder" or node not in constants or value is None:
        return None
    located, matrix = context.locate(node), value_of(node)
    if located is None or located[0].config is None or matrix is None or matrix.dtype != value.dtype or value._version > 0:
        return None
    dims = CONVOLUTIONS.get(product.target)
    # A depthwise convolution stays in float.
    fits = product.target in LINEARS and matrix.dim() == 2 if dims is None else value.dim() == 2 + dims and matrix.shape[1] > 1
    return located[0] if fits else None


def _sources(node: fx.Node, product: fx.Node) -> set[fx.Node]:
    """What ``node`` and ``product`` read, but for x, the product itself, and numbers."""
    read = {*node.all_input_nodes, *product.all_input_nodes} - {product, product.args[0]}
    return {each for each in read if not is_number(each)}


def _are_fixed(sources: set[fx.Node], constants: dict[fx.Node, Any]) -> bool:
    """Whether they come from parameters alone, and nothing writes to them."""
    return all(each in constants and is_constant(each) for source in sources for each in ancestors(source))


def _obstacle(context: Context, weight: GraphWeight) -> str:
    """Why ``weight`` cannot be scaled, or ""."""
    if torch.is_grad_enabled():
        return "it would get no gradient; call under torch.no_grad()"
    if context.config.release_weights:
        return "release_weights=True frees the floats that its scaled form is computed from"
    if len(weight.node.users) > 1:
        return "other nodes use the weight as it is"
    if weight.value.dtype == torch.float16:
        return "float16 may not hold the scaled weight"
    return ""


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _scale(node: fx.Node, product: fx.Node, constants: dict[fx.Node, Any]) -> Scale | None:
    """How ``node`` scales and shifts the rows of ``product``, or None when it does something else."""
    if node.target is functional.batch_norm:
        return _batch_norm(node, product, constants)
    if len(node.args) != 2 or node.kwargs:
        return None
    first: Any = node.args[0]
    second: Any = node.args[1]
    factor = second if first is product else first
    if node.target in DIVIDE:
        return _number(node, 1 / second if first is product and _is_number(second) else None)
    if isinstance(factor, fx.Node):
        by_row = factor in constants and _is_by_row(value_of(factor), product)
        return (lambda call: (call(torch.flatten, factor), None)) if by_row else None
    return _number(node, factor)


def _is_number(given: Any) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool) and given != 0 and math.isfinite(given)


def _number(node: fx.Node, factor: Any) -> Scale | None:
    """A scale by ``factor``, if what reads ``node`` is a sum, which can then become part of the product."""
    if not _is_number(factor) or len(node.users) != 1 or next(iter(node.users)).target not in ADD:
        return None
    return lambda call: (factor, None)


def _is_softcap(node: fx.Node) -> bool:
    """Whether ``node`` is the ``y / c`` of ``tanh(y / c) * c``."""
    scales_by_number = len(node.args) == 2 and _is_number(node.args[1])
    return scales_by_number and [reader.target in ACTIVATIONS["tanh"] for reader in node.users] == [True]


def _is_by_row(factor: Tensor | None, product: fx.Node) -> bool:
    """Whether ``factor`` has one number for each row of the weight, and lies along the rows of the product's result."""
    value: Any = value_of(product)
    if factor is None or factor.dtype != value.dtype or factor.dim() > value.dim():
        return False
    dim = value.dim() - 1 if product.target in LINEARS else 1
    sizes = [1] * (value.dim() - factor.dim()) + list(factor.shape)
    return all(str(size) == (str(value.shape[i]) if i == dim else "1") for i, size in enumerate(sizes))


def _batch_norm(node: fx.Node, product: fx.Node, constants: dict[fx.Node, Any]) -> Scale | None:
    given = dict(zip(BATCH_NORM, node.args[1:], strict=False)) | dict(node.kwargs)
    mean, variance, weight, bias = (given.get(name) for name in BATCH_NORM[:4])
    value: Any = value_of(product)
    if given.get("training") or node.args[0] is not product or (product.target in LINEARS and value.dim() != 2):
        return None
    if any(operand not in constants for operand in (mean, variance)):
        return None
    operands = [operand for operand in (mean, variance, weight, bias) if operand is not None]
    if any(operand not in constants or value_of(operand).dtype != value.dtype for operand in operands):  # type: ignore[union-attr]
        return None
    if (eps := number_of(given.get("eps", 1e-5))) is None:
        return None

    def scale(call: Any) -> tuple[Any, Any]:
        s = call(torch.rsqrt, call(torch.add, variance, eps))
        s = s if weight is None else call(torch.mul, s, weight)
        t = call(torch.neg, call(torch.mul, mean, s))
        return s, t if bias is None else call(torch.add, t, bias)

    return scale


def _fold(context: Context, node: fx.Node, product: fx.Node, scale: Scale) -> None:
    """Let ``product`` compute what ``node`` does."""

    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return context.graph.call_function(target, args)

    x, weight, *rest = product.args
    keywords = dict(product.kwargs)
    bias: Any = rest[0] if rest else keywords.pop("bias", None)
    dims = 1 + CONVOLUTIONS.get(product.target, 0)
    with context.graph.inserting_before(_hoist(context.graph, _sources(node, product))):
        s, t = scale(call)
        by_row = call(torch.reshape, s, [-1, *[1] * dims]) if isinstance(s, fx.Node) else s
        scaled = call(torch.mul, weight, by_row)
        if bias is not None:
            shifted = call(torch.mul, bias, s)
            t = shifted if t is None else call(torch.add, shifted, t)
        product.args = (x, scaled, t, *rest[1:])
        product.kwargs = keywords
    node.replace_all_uses_with(product)
    context.graph.erase_node(node)


def _hoist(graph: fx.Graph, sources: set[fx.Node]) -> fx.Node:
    """Move what ``sources``, all constant, are computed by to the front, so that nothing stands between products that follow one
    another. The node that is then the first behind it."""
    wanted = {each for source in sources for each in ancestors(source) if each.op != "placeholder"}
    first: fx.Node = next(each for each in graph.nodes if each.op != "placeholder" and each not in wanted)
    for each in list(graph.nodes):
        if each in wanted:
            first.prepend(each)
    return first
