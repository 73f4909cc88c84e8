"""Take rows before they are multiplied: of ``head(hidden)[:, -1]`` the last row alone reaches the head.

A product over the last dimension computes each row by itself, and so does what is computed element by element behind it, a softcap
or a cast. So a selection of rows that alone reads the result may as well be made of the operand.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from kbit_inductor.capture import VALUE, Context
from kbit_inductor.passes.patterns import ACTIVATIONS, CASTS, DIVIDE, GELU, MULTIPLY, is_constant, value_of
from kbit_inductor.passes.products import linear_operands
from kbit_inductor.passes.values import infer_values

ELEMENTWISE = (*MULTIPLY, *DIVIDE, *CASTS, *GELU, *(target for targets in ACTIVATIONS.values() for target in targets))


def select_early(gm: fx.GraphModule, context: Context) -> None:
    """Move each selection of rows in front of the product with a weight that it selects from, and count them."""
    for node in list(context.graph.find_nodes(op="call_function", target=operator.getitem)):
        path = _path(context, node)
        if path:
            _move(context, node, path)
            infer_values(gm, context)
            context.fusions["selected"] += 1


def _path(context: Context, node: fx.Node) -> list[fx.Node]:
    """From what ``node`` selects rows from back to the product, if all of that may be computed of these rows alone; else none."""
    path: list[fx.Node] = []
    each: Any = node.args[0]
    if not _selects_rows(node):
        return path
    while isinstance(each, fx.Node) and len(each.users) == 1 and is_constant(each):
        path.append(each)
        if (operands := linear_operands(each)) is not None:
            x, weight = operands
            return path if context.weight_of(weight) is not None and x is not weight else []
        if each.target not in ELEMENTWISE or len(each.all_input_nodes) != 1 or each.kwargs.get("inplace"):
            break
        each = each.args[0]
    return []


def _selects_rows(node: fx.Node) -> bool:
    """Whether ``node`` is ``y[index]`` with fewer rows than y, by numbers alone, and with all of the last dimension."""
    base, selected = value_of(node.args[0]), value_of(node)
    if base is None or selected is None or not selected.dim() or str(base.shape) == str(selected.shape):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(_is_plain(each) for each in index):
        return False
    named = [each for each in index if each is not ...]
    reaches_last = len(named) == base.dim() or (... in index and index[-1] is not ...)
    return not reaches_last or index[-1] == slice(None)


def _is_plain(each: Any) -> bool:
    if isinstance(each, slice):
        return all(part is None or type(part) is int for part in (each.start, each.stop, each.step))
    return each is ... or type(each) is int


def _move(context: Context, node: fx.Node, path: list[fx.Node]) -> None:
    """Let the last of ``path``, the product, take the rows that ``node`` selects, and the others what that gives."""
    product = path[-1]
    with context.graph.inserting_before(product):
        rows = context.graph.call_function(operator.getitem, (product.args[0], node.args[1]))
    product.update_arg(0, rows)
    node.replace_all_uses_with(path[0])
    context.graph.erase_node(node)
    for each in path:
        del each.meta[VALUE]
