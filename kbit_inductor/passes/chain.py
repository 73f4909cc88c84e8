"""Products and attention of a decoding step that follow one another become one call, ``kbit::chain_cpu``.

With one row of activations a call costs as much as the product in it: its arguments are boxed, its threads are gathered and sent
away again. In a chain the threads stay together, and the next weight is on its way while they wait for each other. A Llama layer of
a decoding step is two calls then: the chain from its attention to the projections of the next layer, and one kernel of Inductor.

One launch for a whole block after the manner of GPU megakernels (Spector et al., "Look Ma, No Bubbles!", 2025).
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from kbit_inductor.capture import VALUE, Context
from kbit_inductor.lowering import chain as chains
from kbit_inductor.passes.fuse import ATTENTION, FUSED, Call
from kbit_inductor.passes.patterns import is_constant, value_of

CHAIN = torch.ops.kbit.chain_cpu.default
MOST_ROWS = 16  # with more the products take so long that nothing is gained
# What may stand between the attention and the product behind it. They change no value and, heads being together, no order.
LAYOUTS = ("contiguous", "reshape", "view", "flatten", torch.reshape, torch.flatten)


def chain(context: Context) -> None:
    """Make chains of two calls and more, and count the calls in them."""
    order = {node: position for position, node in enumerate(context.graph.nodes)}
    found: list[list[fx.Node]] = []
    for node in context.graph.nodes:
        if node.target not in (FUSED, ATTENTION) or not _has_few_rows(node):
            continue
        if found and _continues(found[-1], node, order):
            found[-1].append(node)
        elif node.target is FUSED or _heads_together(node) is not None:
            found.append([node])
    for calls in found:
        if len(calls) > 1:
            _replace(context, calls)
            context.fusions["chained"] += len(calls)


def _has_few_rows(node: fx.Node) -> bool:
    value = value_of(node)
    if value is None:
        return False
    sizes = value.shape[:-1] if node.target is FUSED else (value.shape[0], value.shape[2])
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= MOST_ROWS


def _continues(calls: list[fx.Node], node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether ``node`` may be computed where the first of ``calls`` is: what it reads is there, or comes from them.

    Not so attention, which reads a cache that the graph writes to: it stays where it is, and begins a chain.
    """
    if Call.of(node) is None:
        return False
    made = [_result(each) for each in calls]
    operands = [operand for operand in _operands(node) if operand is not None]
    return all(is_constant(operand) and (operand in made or order[operand] < order[calls[0]]) for operand in operands)


def _operands(node: fx.Node) -> list[fx.Node | None]:
    if node.target is ATTENTION:
        return list(node.args[:4])  # type: ignore[arg-type]
    call = Call(*node.args)  # type: ignore[arg-type]
    return [call.x, call.norm_weight, call.residual, *call.weights, *call.biases]


def _result(node: fx.Node) -> fx.Node:
    """The node whose value a chain gives for the call ``node``."""
    return node if node.target is FUSED else _heads_together(node) or node


def _heads_together(attention: fx.Node) -> fx.Node | None:
    """The node that lays the heads of each query side by side, ``[B, M, H * D]``, if that is all that is read of ``attention``."""
    batch, heads, queries, size = attention.meta[VALUE].shape
    apart: tuple[Any, ...] = (batch, heads, queries, size)
    swapped: tuple[Any, ...] = (batch, queries, heads, size)
    together: tuple[Any, ...] = (batch, queries, heads * size)
    node, shape = attention, apart
    while len(node.users) == 1:
        user = next(iter(node.users))
        if _swaps_heads_and_queries(user) and shape == apart:
            after = swapped
        elif user.target in LAYOUTS and is_constant(user):
            after = tuple(user.meta[VALUE].shape)
        else:
            break
        if after != shape and (shape, after) not in ((apart, swapped), (swapped, together)):
            break
        node, shape = user, after
    return node if shape == together else None


def _swaps_heads_and_queries(node: fx.Node) -> bool:
    return node.target in ("transpose", torch.transpose) and {dim % 4 for dim in node.args[1:]} == {1, 2}  # type: ignore[operator]


def _replace(context: Context, calls: list[fx.Node]) -> None:
    graph = context.graph
    results = [_result(node) for node in calls]
    operands = [operand for node in calls for operand in _operands(node) if operand is not None]
    inputs = list(dict.fromkeys(operand for operand in operands if operand not in results))
    positions: dict[Any, int] = {node: position for position, node in enumerate([*inputs, *results])}
    positions[None] = chains.NONE
    steps = [
        chains.Step(_call(node, positions), any(user not in calls for user in result.users))
        for node, result in zip(calls, results, strict=True)
    ]
    returned = [result for result, step in zip(results, steps, strict=True) if step.returned]
    with graph.inserting_before(calls[0]):
        created = graph.call_function(CHAIN, (inputs, *chains.encode(steps)))
        created.meta = {**calls[0].meta, VALUE: [result.meta[VALUE] for result in returned]}
        for position, result in enumerate(returned):
            part = graph.call_function(operator.getitem, (created, position))
            part.meta = dict(result.meta)
            result.replace_all_uses_with(part)
    for node, result in reversed(list(zip(calls, results, strict=True))):
        _erase_back_to(graph, node, result)
        context.moved(node, created)


def _call(node: fx.Node, positions: dict[Any, int]) -> chains.Product | chains.Attention:
    if node.target is ATTENTION:
        query, key, value, mask = (positions[tensor] for tensor in _operands(node))
        return chains.Attention(query, key, value, mask, node.args[4])  # type: ignore[arg-type]
    call = Call(*node.args)  # type: ignore[arg-type]
    at = {name: positions[vars(call)[name]] for name in ("x", "norm_weight", "residual")}
    weights, biases = (tuple(positions[tensor] for tensor in tensors) for tensors in (call.weights, call.biases))
    return chains.Product(**{**vars(call), **at, "weights": weights, "biases": biases, "rows": tuple(call.rows)})


def _erase_back_to(graph: fx.Graph, node: fx.Node, result: fx.Node) -> None:
    """Erase ``result`` and what it is a view of, up to ``node``."""
    while result is not node:
        source: Any = result.args[0]
        graph.erase_node(result)
        result = source
    graph.erase_node(node)
