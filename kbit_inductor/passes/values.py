"""Fake values for the nodes that a pass created without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from kbit_inductor._compat import symbolic_shapes
from kbit_inductor.capture import VALUE, Context

CALLS = ("call_function", "call_method", "call_module")


def infer_values(gm: fx.GraphModule, context: Context) -> None:
    """Run each node without a value on the values of its operands, and keep what comes out.

    A node whose operands have none, a step of a product in an unusual spelling, is left without.
    """
    for node in gm.graph.nodes:
        if VALUE in node.meta or node.op not in (*CALLS, "get_attr"):
            continue
        if all(VALUE in operand.meta for operand in node.all_input_nodes):
            node.meta[VALUE] = _value(gm, context, node)


def call_fake(context: Context, node: fx.Node, function: Callable[..., Any] | None = None) -> Any:
    """What ``node``, a call, computes from the fake values of its operands; ``function`` is what it calls if it does not say."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta[VALUE])
    with context.fake_mode(), symbolic_shapes():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return (function or node.target)(*args, **kwargs)  # type: ignore[operator]


def _value(gm: fx.GraphModule, context: Context, node: fx.Node) -> Any:
    if node.op == "get_attr":
        attribute = _attribute(gm, str(node.target))
        return context.fake_mode().from_tensor(attribute) if isinstance(attribute, Tensor) else attribute
    return call_fake(context, node, gm.get_submodule(str(node.target)) if node.op == "call_module" else None)


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    found: Any = gm
    for name in path.split("."):
        found = getattr(found, name)
    return found
