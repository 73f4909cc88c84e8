"""Fuse what follows a GPU's products into the kernel that finishes their sums: activations, gates, residual sums.

``kbit::linear_triton`` becomes ``kbit::fused_linear_triton``, ``residual + activation(x @ W.T + bias) * factor``, which rounds once
and stores once. A product is computed later then, where what it was followed by stood, so only if nothing in the graph writes to
what it reads. Only graphs without gradients are fused, since the fused operator has none.

Epilogues of a matrix product after the manner of CUTLASS's (Kerr et al., 2017) and of Inductor's for its own templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kbit_inductor.capture import VALUE, Context
from kbit_inductor.passes.patterns import ADD, MULTIPLY, activation_of, alike, is_constant

LINEAR = torch.ops.kbit.linear_triton.default
FUSED = torch.ops.kbit.fused_linear_triton.default
PLAIN: Mapping[str, Any] = {"activation": "", "factor": None, "residual": None}


@dataclass(frozen=True)
class Call:
    """A call of ``fused_linear_triton``, or of the plain operator as one, its arguments by name."""

    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, node: Any) -> Call | None:
        """The call that ``node`` is, if it may move: what it gives, and all that it reads, is written to by nothing."""
        if not isinstance(node, fx.Node) or node.target not in (LINEAR, FUSED) or node.kwargs:
            return None
        if not all(is_constant(each) for each in (node, *node.all_input_nodes)):
            return None
        schema: Any = node.target._schema.arguments
        defaults = {argument.name: argument.default_value for argument in schema}
        given = zip(defaults, node.args, strict=False)
        return cls({**PLAIN, **defaults, **dict(given)})

    def becomes(self, **changed: Any) -> Call:
        """The call with other arguments."""
        return Call({**self.arguments, **changed})

    def lacks(self, *names: str) -> bool:
        """Whether nothing of these is fused behind the sum and its bias yet."""
        return all(self.arguments[name] == PLAIN[name] for name in names)

    def positional(self) -> tuple[Any, ...]:
        """The arguments in the order of the fused operator."""
        return tuple(self.arguments[argument.name] for argument in FUSED._schema.arguments)


def fuse_epilogues(context: Context) -> None:
    """Fuse all that can be fused, and count how often each kind of fusion was done."""
    if torch.is_grad_enabled() or not context.graph.find_nodes(op="call_function", target=LINEAR):
        return
    for node in list(context.graph.nodes):
        any(fuse(context, node) for fuse in (_activation, _gate, _residual))


# act(linear(x))
def _activation(context: Context, node: fx.Node) -> bool:
    name = activation_of(node)
    product: Any = node.args[0] if name else None
    call = _followed_by(product, node)
    if name is None or call is None or not call.lacks(*PLAIN):
        return False
    return _fuse(context, product, node, call.becomes(activation=name), "activation")


# act(linear(x)) * factor
def _gate(context: Context, node: fx.Node) -> bool:
    for product, other in _operands(node, MULTIPLY):
        call = _followed_by(product, node)
        if call is not None and call.lacks("factor", "residual") and _fits(product, other):
            return _fuse(context, product, node, call.becomes(factor=other), "gate")
    return False


# residual + act(linear(x)) * factor
def _residual(context: Context, node: fx.Node) -> bool:
    for product, other in _operands(node, ADD):
        call = _followed_by(product, node)
        if call is not None and call.lacks("residual") and _fits(product, other):
            return _fuse(context, product, node, call.becomes(residual=other), "residual")
    return False


def _operands(node: fx.Node, targets: tuple[Any, ...]) -> tuple[Any, ...]:
    """Both orders of the operands of ``node``, if it is one of ``targets`` on two; else none."""
    if node.target not in targets or len(node.args) != 2 or node.kwargs:
        return ()
    return node.args, node.args[::-1]


def _followed_by(product: Any, node: fx.Node) -> Call | None:
    """The call that ``product`` is, if only ``node`` reads what it gives."""
    call = Call.of(product)
    return call if call is not None and set(product.users) == {node} else None


def _fits(product: fx.Node, other: Any) -> bool:
    return other is not product and alike(product, other) and is_constant(other)


def _fuse(context: Context, product: fx.Node, node: fx.Node, call: Call, kind: str) -> bool:
    """Compute ``call`` where ``node`` stands, in place of both."""
    with context.graph.inserting_before(node):
        fused = context.graph.call_function(FUSED, call.positional())
    fused.meta = {**node.meta, VALUE: node.meta[VALUE]}
    node.replace_all_uses_with(fused)
    context.graph.erase_node(node)
    context.graph.erase_node(product)
    context.moved(product, fused)
    context.fusions[kind] += 1
    return True
