"""Fuse what surrounds a GPU's products into their kernel: activations, gates, residual sums, products of the same x, norms.

``kbit::linear_triton`` becomes ``kbit::fused_linear_triton`` (:mod:`kbit_inductor.lowering.gpu`), which rounds and stores once. A
product is computed later then, where what it was followed by stood, or earlier, with the first of those that read its x; so only
if nothing in the graph writes to what it reads. Only graphs without gradients are fused, since the fused operator has none.

Epilogues of a matrix product after the manner of CUTLASS's (Kerr et al., 2017) and of Inductor's for its own templates; siblings
and gates after that of vLLM's ``qkv_proj`` and ``gate_up_proj``, without concatenating weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kbit_inductor.capture import VALUE, Context
from kbit_inductor.passes.norms import rms_norm
from kbit_inductor.passes.patterns import (
    ADD,
    MULTIPLY,
    activation_of,
    alike,
    erase_dead,
    hoisted_bias,
    is_constant,
    is_float_product,
    value_of,
)

LINEAR = torch.ops.kbit.linear_triton.default
FUSED = torch.ops.kbit.fused_linear_triton.default
PLAIN: Mapping[str, Any] = {"norm_weight": None, "eps": 0.0, "activation": "", "gated": False, "factor": None, "residual": None}
LISTS = ("words", "scale", "offset", "global_scale", "bias", "codebook")
SHARED = ("x", "bits", "group_size", "activation_bits")
NOT_ROUNDED = 16
MOST_MATRICES = 8
"""Of a launch: each program finds its own by comparing with all."""


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
        given = {**PLAIN, **defaults, **dict(zip(defaults, node.args, strict=False))}
        if node.target is LINEAR:
            given |= {name: [] if given[name] is None else [given[name]] for name in LISTS}
        return cls(given)

    def becomes(self, **changed: Any) -> Call:
        """The call with other arguments."""
        return Call({**self.arguments, **changed})

    def lacks(self, *names: str) -> bool:
        """Whether nothing of these is fused into the product yet."""
        return all(self.arguments[name] == PLAIN[name] for name in names)

    def kind(self) -> tuple[Any, ...]:
        """What calls have in common whose matrices one launch may multiply by: x, format, and what there is of each matrix."""
        bias = self.arguments["bias"]
        of_bias = value_of(bias[0]) if bias else None
        there = tuple(bool(self.arguments[name]) for name in LISTS)
        return (*(self.arguments[name] for name in SHARED), there, None if of_bias is None else of_bias.dtype)

    def beside(self, *others: Call) -> Call:
        """The call with the matrices of others too."""
        calls = (self, *others)
        return self.becomes(**{name: [each for call in calls for each in call.arguments[name]] for name in LISTS})

    def positional(self) -> tuple[Any, ...]:
        """The arguments in the order of the fused operator."""
        return tuple(self.arguments[argument.name] for argument in FUSED._schema.arguments)


def fuse_epilogues(context: Context) -> None:
    """Fuse all that can be fused, and count how often each kind of fusion was done."""
    if torch.is_grad_enabled() or not context.graph.find_nodes(op="call_function", target=LINEAR):
        return
    for node in list(context.graph.nodes):
        any(fuse(context, node) for fuse in (_activation, _gate_of_two, _gate, _residual))
    _siblings(context)
    for node in list(context.graph.nodes):
        _norm(context, node)


# act(linear(x))
def _activation(context: Context, node: fx.Node) -> bool:
    name = activation_of(node)
    product: Any = node.args[0] if name else None
    call = _followed_by(product, node)
    if name is None or call is None or not call.lacks(*PLAIN):
        return False
    return _fuse(context, [product], node, call.becomes(activation=name), "activation")


# act(linear(x)) * linear(x)
def _gate_of_two(context: Context, node: fx.Node) -> bool:
    for gate, product in _operands(node, MULTIPLY):
        first, second = _followed_by(gate, node), _followed_by(product, node)
        if first is None or second is None or gate is product or first.kind() != second.kind() or not alike(gate, product):
            continue
        if first.lacks("gated", "factor", "residual") and second.lacks(*PLAIN):
            return _fuse(context, [gate, product], node, first.beside(second).becomes(gated=True), "gate")
    return False


# act(linear(x)) * factor
def _gate(context: Context, node: fx.Node) -> bool:
    for product, other in _operands(node, MULTIPLY):
        call = _followed_by(product, node)
        if call is not None and call.lacks("gated", "factor", "residual") and _fits(product, other):
            return _fuse(context, [product], node, call.becomes(factor=other), "gate")
    return False


# residual + act(linear(x)) * factor
def _residual(context: Context, node: fx.Node) -> bool:
    for product, other in _operands(node, ADD):
        call = _followed_by(product, node)
        if call is not None and call.lacks("residual") and _fits(product, other):
            return _fuse(context, [product], node, call.becomes(residual=other), "residual")
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


def _fuse(context: Context, products: Sequence[fx.Node], node: fx.Node, call: Call, kind: str) -> bool:
    """Compute ``call`` where ``node`` stands, in place of it and of ``products``."""
    with context.graph.inserting_before(node):
        fused = context.graph.call_function(FUSED, call.positional())
    fused.meta = {**node.meta, VALUE: node.meta[VALUE]}
    node.replace_all_uses_with(fused)
    context.graph.erase_node(node)
    for product in products:
        context.graph.erase_node(product)
        context.moved(product, fused)
    context.fusions[kind] += 1
    return True


# q/k/v: products of one x that nothing was fused into become one call, whose result is split.
def _siblings(context: Context) -> None:
    families: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in context.graph.find_nodes(op="call_function", target=LINEAR):
        call = Call.of(node)
        if call is not None and all(hoisted_bias(context.graph, bias) for bias in call.arguments["bias"]):
            families.setdefault(call.kind(), []).append(node)
    for nodes in families.values():
        for first in range(0, len(nodes), MOST_MATRICES):
            _merge(context, nodes[first : first + MOST_MATRICES])


def _merge(context: Context, nodes: Sequence[fx.Node]) -> None:
    calls = [call for node in nodes if (call := Call.of(node)) is not None]
    if len(calls) < 2:
        return
    with context.graph.inserting_before(nodes[0]):
        together = context.graph.call_function(FUSED, calls[0].beside(*calls[1:]).positional())
        with context.fake_mode():
            value = torch.cat([node.meta[VALUE] for node in nodes], dim=-1)
        together.meta = {**nodes[0].meta, VALUE: value}
        start = 0
        for node in nodes:
            rows = node.meta[VALUE].shape[-1]
            part = context.graph.call_function(torch.narrow, (together, -1, start, rows))
            with context.fake_mode():
                part.meta = {**node.meta, VALUE: torch.narrow(value, -1, start, rows)}
            node.replace_all_uses_with(part)
            start += rows
    for node in nodes:
        context.graph.erase_node(node)
        context.moved(node, together)
    context.fusions["siblings"] += len(nodes)


# linear(norm(x)): only in front of activations that are rounded, whose kernel computes the norm too.
def _norm(context: Context, node: fx.Node) -> None:
    call = Call.of(node)
    if call is None or call.arguments["activation_bits"] == NOT_ROUNDED or not call.lacks("norm_weight"):
        return
    if is_float_product(call.arguments["residual"]):
        return  # which reads the norm too, so it must be there
    normed = call.arguments["x"]
    found = rms_norm(normed, halves=True)
    if found is None:
        return
    x, weight, eps = found
    with context.graph.inserting_before(node):
        fused = context.graph.call_function(FUSED, call.becomes(x=x, norm_weight=weight, eps=eps).positional())
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    context.graph.erase_node(node)
    context.moved(node, fused)
    erase_dead(context.graph, normed)
    context.fusions["norm"] += 1
