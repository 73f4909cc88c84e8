"""Take away what stands between a product and what could be fused into it: dropout that is off, views, activations written out.

Views are those of a linear layer that is computed on a matrix, as GPT-2's ``Conv1D`` and ``x @ w.t()`` are: ``x`` is flattened to
rows before the product, and its result gets the shape back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

from kbit_inductor.capture import VALUE, Context
from kbit_inductor.passes.patterns import DROPOUTS, erase_dead, is_off, value_of
from kbit_inductor.passes.spelled import spelled_gelu

aten = torch.ops.aten
PRODUCTS = tuple(getattr(torch.ops.kbit, name).default for name in ("linear_cpu", "tiled_linear_cpu", "linear_triton"))
VIEWS = (
    "view", "reshape", "flatten", torch.reshape, torch.flatten, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.flatten.using_ints,
)  # fmt: skip


def clear_between(context: Context) -> None:
    """Do so around every product of ``context.graph``. Only in graphs without gradients, as nothing is fused in others."""
    products = [node for target in PRODUCTS for node in context.graph.find_nodes(op="call_function", target=target)]
    if torch.is_grad_enabled() or not products:
        return
    for node in list(context.graph.nodes):
        if node.target in DROPOUTS and is_off(node):
            node.replace_all_uses_with(node.args[0])
            context.graph.erase_node(node)
    for product in products:
        _unflatten(context, product)
    for node in list(context.graph.nodes):
        found = spelled_gelu(node)
        if found is not None and found[1].target in PRODUCTS:
            _write_short(context, node, *found)


def _unflatten(context: Context, product: fx.Node) -> None:
    """``view(linear(view(x, [-1, K])), [*x.shape[:-1], N])`` is ``linear(x)``."""
    flat: Any = product.args[0]
    if flat.target not in VIEWS or len(product.users) != 1:
        return
    x, back = flat.args[0], next(iter(product.users))
    source, rows, result = value_of(x), value_of(flat), value_of(back)
    if back.target not in VIEWS or source is None or rows is None or result is None:
        return
    sizes = [str(size) for size in (*source.shape[:-1], product.meta[VALUE].shape[-1])]
    if not source.dim() or str(source.shape[-1]) != str(rows.shape[-1]) or [str(size) for size in result.shape] != sizes:
        return
    product.args = (x, *product.args[1:])
    product.meta[VALUE] = result
    back.replace_all_uses_with(product)
    context.graph.erase_node(back)
    erase_dead(context.graph, flat)


def _write_short(context: Context, node: fx.Node, form: str, x: fx.Node) -> None:
    """Let one call of torch compute the GELU of ``x``, as ``node`` does."""
    with context.graph.inserting_before(node):
        short = context.graph.call_function(functional.gelu, (x,), {"approximate": form})
    short.meta = dict(node.meta)
    node.replace_all_uses_with(short)
    erase_dead(context.graph, node)
