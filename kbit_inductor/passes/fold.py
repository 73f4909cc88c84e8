"""Fold what scales and shifts each row of a product into its weight and bias: batch norms and LayerScale.

``norm(x @ W.T + b) = x @ (s W).T + (s b + t)`` (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", section 3.2). ``s W`` is a weight that the graph computes from parameters, so
:mod:`kbit_inductor.passes.derive` computes it when it is packed, and again when a source changes. What is left at a call is the sum
of a bias, and activations or residual sums behind it can become part of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor.capture import Context
from kbit_inductor.passes.derive import constant_nodes
from kbit_inductor.passes.patterns import MULTIPLY, value_of
from kbit_inductor.passes.products import LINEARS
from kbit_inductor.passes.values import infer_values

CONVOLUTIONS: dict[Any, int] = {
    torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3, functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3,
}  # fmt: skip
BATCH_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
Scale = Callable[[Any], tuple[Any, Any]]
"""From the function that adds a call to the graph to the nodes of s and t, ``[N]``; t is None for none."""


def fold(gm: fx.GraphModule, context: Context) -> None:
    """Rewrite each product whose result only a batch norm or a constant vector reads; nothing with gradients, which the
    scales would not get, nor where float weights are released, since the weight's floats would have to stay."""
    if torch.is_grad_enabled() or context.config.release_weights:
        return
    for node in list(context.graph.nodes):
        constants = constant_nodes(context) if _may_scale(node) else {}
        for product in node.all_input_nodes if constants else ():
            if _is_alone(context, product) and (scale := _scale(node, product, constants)) is not None:
                _fold(context, node, product, scale)
                context.fusions["folded"] += 1
                infer_values(gm, context)
                break


def _may_scale(node: fx.Node) -> bool:
    return node.target is functional.batch_norm or node.target in MULTIPLY


def _is_alone(context: Context, product: fx.Node) -> bool:
    """Whether ``product`` multiplies by a weight that will be packed, used here only, in its own dtype, and has one reader."""
    if len(product.users) != 1 or product.op != "call_function" or len(product.args) < 2 or "weight" in product.kwargs:
        return False
    weight, value = product.args[1], value_of(product)
    if not isinstance(weight, fx.Node) or weight.op != "placeholder" or len(weight.users) != 1 or value is None:
        return False
    located, matrix = context.locate(weight), value_of(weight)
    if located is None or located[0].config is None or matrix is None or matrix.dtype != value.dtype or value._version > 0:
        return False
    dims = CONVOLUTIONS.get(product.target)
    if dims is None:
        return product.target in LINEARS and matrix.dim() == 2
    return value.dim() == 2 + dims and matrix.shape[1] > 1  # no depthwise one, which stays in float


def _scale(node: fx.Node, product: fx.Node, constants: dict[fx.Node, Any]) -> Scale | None:
    """How ``node`` scales and shifts the rows of ``product``, or None when it does something else."""
    if node.target is functional.batch_norm:
        return _batch_norm(node, product, constants)
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    factor = second if first is product else first
    if factor not in constants or not _is_by_row(value_of(factor), product):
        return None
    return lambda call: (call(torch.flatten, factor), None)


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
    eps = given.get("eps", 1e-5)  # a node where sizes and numbers are symbols
    if (
        given.get("training")
        or not isinstance(eps, float)
        or node.args[0] is not product
        or (product.target in LINEARS and value.dim() != 2)
    ):
        return None
    if any(operand not in constants for operand in (mean, variance)):
        return None
    operands = [operand for operand in (mean, variance, weight, bias) if operand is not None]
    if any(operand not in constants or value_of(operand).dtype != value.dtype for operand in operands):  # type: ignore[union-attr]
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
    with context.graph.inserting_before(_place(node, product)):
        s, t = scale(call)
        scaled = call(torch.mul, weight, call(torch.reshape, s, [-1, *[1] * dims]))
        if bias is not None:
            shifted = call(torch.mul, bias, s)
            t = shifted if t is None else call(torch.add, shifted, t)
        product.args = (x, scaled, t, *rest[1:])
        product.kwargs = keywords
    node.replace_all_uses_with(product)
    context.graph.erase_node(node)


def _place(node: fx.Node, product: fx.Node) -> fx.Node:
    """Before what the scaled weight and bias may be computed: the first call where they come from inputs alone, so that nothing
    stands between products that follow one another."""
    sources = {*node.all_input_nodes, *product.all_input_nodes} - {product, product.args[0]}
    if all(source.op == "placeholder" for source in sources):
        first: fx.Node = next(each for each in node.graph.nodes if each.op != "placeholder")
        return first
    return product
