"""Find products and look-ups with a constant weight and mark them. No weight's value is read.

Pattern and replacement of each operator stand side by side; convolutions have a module of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from kbit_inductor._compat import OpOverload
from kbit_inductor.capture import VALUE, Context
from kbit_inductor.passes.bags import embedding_bag
from kbit_inductor.passes.convolutions import convolution
from kbit_inductor.passes.patterns import LINEARS
from kbit_inductor.passes.rewriter import (
    Batch,
    Rewriter,
    located,
    packed_batched_linear,
    packed_grouped_linear,
)
from kbit_inductor.weights.views import Strides, first_matrix, transposed

aten = torch.ops.aten
EMBEDDINGS = (functional.embedding, functional.embedding_bag)


def linear_operands(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """x and the weight, if ``node`` is a linear operator with both by position and both of them nodes; else None."""
    if not isinstance(node, fx.Node) or node.target not in LINEARS or len(node.args) < 2:
        return None
    x, weight = node.args[:2]
    return (x, weight) if isinstance(x, fx.Node) and isinstance(weight, fx.Node) else None


def match_products(context: Context) -> None:
    """Mark every product and look-up whose weight is a parameter, or say why not."""
    spared = context.spared()
    for node in list(context.graph.nodes):
        rule = rule_of(node)
        if node in spared or node.op != "call_function" or rule is None or not _weights_of(context, node):
            continue
        if context.is_inside_transform(node):
            continue
        with context.graph.inserting_before(node):
            replacement = rule(Rewriter(context, node), *node.args, **node.kwargs)
        if replacement is not None:
            # AOTAutograd caches no graph in which a method is called on a node without a value.
            replacement.meta[VALUE] = node.meta[VALUE]
            node.replace_all_uses_with(replacement)
            context.graph.erase_node(node)


def _weights_of(context: Context, node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if context.weight_of(operand) is not None]


def _window(rewriter: Rewriter, node: Any, dims: int) -> Strides | None:
    """Where ``node`` lies in a weight, if it is a view of one with ``dims`` dimensions."""
    located = rewriter.context.locate(node)
    return located[3] if located is not None and len(located[3].size) == dims else None


def _linear(rewriter: Rewriter, input: Any, weight: Any, bias: Any = None) -> fx.Node | None:
    window = _window(rewriter, weight, 2)
    if window is None:
        return None
    if bias is None or tuple(bias.meta[VALUE].shape) == window.size[:1]:
        return rewriter.linear(input, weight, window, bias)
    # torch broadcasts it, the operators do not.
    dtype = rewriter.node.meta[VALUE].dtype
    bias = bias if bias.meta[VALUE].dtype == dtype else rewriter.call(aten._to_copy.default, bias, dtype=dtype)
    return rewriter.sum(rewriter.linear(input, weight, window), 1, bias, 1)


def _mm(rewriter: Rewriter, a: Any, b: Any, bias: Any = None) -> fx.Node | None:
    window = _window(rewriter, b, 2)
    if window is not None:
        return rewriter.linear(a, b, transposed(window), bias)
    window = _window(rewriter, a, 2)
    if window is not None and bias is None:
        return rewriter.permuted(rewriter.linear(rewriter.call(aten.t.default, b), a, window), (1, 0))
    return None


def _addmm(rewriter: Rewriter, other: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> fx.Node | None:
    window = _window(rewriter, b, 2)
    shape = tuple(other.meta[VALUE].shape)
    if window is not None and beta == 1 and alpha == 1 and shape == (window.size[1],):
        return _mm(rewriter, a, b, other)
    product = _mm(rewriter, a, b)
    return None if product is None else rewriter.sum(product, alpha, other, beta)


def _bmm(rewriter: Rewriter, a: Any, b: Any) -> fx.Node | None:
    for operand, is_left in ((b, False), (a, True)):
        batch = Batch.of(rewriter.context, operand)
        if batch is None:
            continue
        if not is_left:
            return _batched(rewriter, a, operand, batch.transposed)
        product = _batched(rewriter, rewriter.call(aten.transpose.int, b, 1, 2), operand, batch)
        return rewriter.permuted(product, (0, 2, 1))
    return None


def _batched(rewriter: Rewriter, x: Any, operand: fx.Node, batch: Batch) -> fx.Node:
    if batch.index is None and batch.window.size[0] == 1:
        return rewriter.linear(x, operand, first_matrix(batch.window))
    index: Any = batch.index
    if index is not None and index.meta[VALUE].dim() != 1:
        index = rewriter.call(aten.reshape.default, index, [-1])
    return rewriter.batched(packed_batched_linear, x, batch, index)


def _grouped_mm(
    rewriter: Rewriter, a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> fx.Node | None:
    batch = Batch.of(rewriter.context, b)
    if batch is None or batch.index is not None or offs is None or bias is not None or a.meta[VALUE].dim() != 2:
        return None
    return rewriter.batched(packed_grouped_linear, a, batch.transposed, offs)


def _transformers_grouped_mm(rewriter: Rewriter, input: Any, weight: Any, offs: Any) -> fx.Node | None:
    return _grouped_mm(rewriter, input, weight, offs)


def _baddbmm(rewriter: Rewriter, other: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> fx.Node | None:
    product = _bmm(rewriter, a, b)
    return None if product is None else rewriter.sum(product, alpha, other, beta)


def _mv(rewriter: Rewriter, matrix: Any, vector: Any) -> fx.Node | None:
    window = _window(rewriter, matrix, 2)
    return None if window is None else rewriter.linear(vector, matrix, window)


def _addmv(rewriter: Rewriter, other: Any, matrix: Any, vector: Any, *, beta: Any = 1, alpha: Any = 1) -> fx.Node | None:
    product = _mv(rewriter, matrix, vector)
    return None if product is None else rewriter.sum(product, alpha, other, beta)


def _embedding(
    rewriter: Rewriter,
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> fx.Node | None:
    context, window = rewriter.context, _window(rewriter, weight, 2)
    if window is None:
        return None
    if max_norm is not None:
        context.explain(located(context, weight)[0], "max_norm rescales its rows at every call")
        return None
    return rewriter.look_up(input, weight, window, rewriter.node.meta[VALUE].dtype)


Rule = Callable[..., "fx.Node | None"]
PRODUCTS: dict[Any, Rule] = {
    **dict.fromkeys(LINEARS, _linear),
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.baddbmm.default: _baddbmm,
    aten.mv.default: _mv,
    aten.addmv.default: _addmv,
    aten._grouped_mm.default: _grouped_mm,
    aten.convolution.default: convolution,
}
LOOK_UPS: dict[Any, Rule] = dict(zip(EMBEDDINGS, (_embedding, embedding_bag), strict=True))
# Of other libraries, by name: what transformers calls for its experts where grouped_mm does not take their dtype.
FOREIGN: dict[str, Rule] = {"transformers::grouped_mm_fallback": _transformers_grouped_mm}


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for the operator that ``node`` calls, or None when it is no product or look-up."""
    if isinstance(node.target, OpOverload) and (foreign := FOREIGN.get(node.target.name())) is not None:
        return foreign
    return PRODUCTS.get(node.target) or LOOK_UPS.get(node.target)
