"""Products and attention of a decoding step that follow one another become one call, ``kbit::chain_cpu``.

With one row of activations a call costs as much as the product in it: its arguments are boxed, its threads are gathered and sent
away again. In a chain the threads stay together, and the next weight is on its way while they wait for each other. Where the cache
is written to as :mod:`kbit_inductor.passes.append` knows it, a decoding step of a Llama is one chain, ``kbit::caching_chain_cpu``,
from its first layer to its logits.

One launch for a whole model after the manner of GPU megakernels (Spector et al., "Look Ma, No Bubbles!", 2025).
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from kbit_inductor.capture import VALUE, Context
from kbit_inductor.lowering import chain as chains
from kbit_inductor.passes.append import Appended, appended
from kbit_inductor.passes.call import ATTENTION, FUSED, Call
from kbit_inductor.passes.patterns import is_constant, value_of

CHAIN = torch.ops.kbit.chain_cpu.default
CACHING_CHAIN = torch.ops.kbit.caching_chain_cpu.default
MOST_ROWS = 16  # with more the products take so long that nothing is gained
# What may stand between the attention and the product behind it. They change no value and, heads being together, no order.
LAYOUTS = ("contiguous", "reshape", "view", "flatten", torch.reshape, torch.flatten)


def chain(context: Context) -> None:
    """Make chains of two calls and more, and count the calls in them."""
    order = {node: position for position, node in enumerate(context.graph.nodes)}
    found: list[_Chain] = []
    for node in context.graph.nodes:
        if node.target not in (FUSED, ATTENTION) or not _has_few_rows(node) or _is_causal(node):
            continue
        if found and found[-1].takes(node):
            found[-1].append(node)
        elif node.target is FUSED or _heads_together(node) is not None:
            found.append(_Chain(context, order))
            found[-1].append(node)
    for each in found:
        if len(each.calls) > 1:
            each.replace()


def _has_few_rows(node: fx.Node) -> bool:
    value = value_of(node)
    if value is None:
        return False
    sizes = value.shape[:-1] if node.target is FUSED else (value.shape[0], value.shape[2])
    return all(isinstance(size, int) for size in sizes) and math.prod(sizes) <= MOST_ROWS


def _is_causal(node: fx.Node) -> bool:
    return node.target is ATTENTION and node.args[5:] == (True,)


class _Chain:
    """Calls of a graph that may be computed where the first of them is."""

    def __init__(self, context: Context, order: dict[fx.Node, int]) -> None:
        self.context = context
        self.graph = context.graph
        self.order = order
        self.calls: list[fx.Node] = []
        self.appended: dict[fx.Node, Appended] = {}  # by attention

    def takes(self, node: fx.Node) -> bool:
        """Whether ``node`` may be computed where the first call is: what it reads is there, or comes from the calls so far.

        Not so attention on a cache that the graph writes to in another way than a step can.
        """
        caching = self._appended(node)
        if Call.of(node) is None and (caching is None or _heads_together(node) is None):
            return False
        made = [_result(each) for each in self.calls]
        operands = [operand for operand in _operands(node, caching) if operand is not None]
        if not all(is_constant(operand) and (operand in made or self._is_there(operand)) for operand in operands):
            return False
        return caching is None or not isinstance(caching.keys.start, fx.Node) or self._is_there(caching.keys.start)

    def append(self, node: fx.Node) -> None:
        caching = self._appended(node)
        if caching is not None and self.calls:
            self.appended[node] = caching
        self.calls.append(node)

    def _appended(self, node: fx.Node) -> Appended | None:
        return appended(node, self.order) if node.target is ATTENTION else None

    def _is_there(self, node: fx.Node) -> bool:
        return self.order[node] < self.order[self.calls[0]]

    def replace(self) -> None:
        results = [_result(node) for node in self.calls]
        writes = {write.node for each in self.appended.values() for write in (each.keys, each.values)}
        replaced = _only_for({*self.calls, *results, *writes})
        computed = {*results, *(result for each in self.appended.values() for result in each.results)}
        operands = [operand for node in self.calls for operand in _operands(node, self.appended.get(node)) if operand is not None]
        inputs = list(dict.fromkeys(operand for operand in operands if operand not in computed))
        caches = list(dict.fromkeys(write.cache for each in self.appended.values() for write in (each.keys, each.values)))
        steps, returned = self._steps(results, [*inputs, *caches], replaced)
        with self.graph.inserting_before(self.calls[0]):
            created = self._caching(inputs, caches, steps, returned) if caches else self._plain(inputs, steps, returned)
        for node in reversed(list(self.graph.nodes)):
            if node in replaced and not node.users and node.op in ("call_function", "call_method"):
                self.graph.erase_node(node)
        for node in self.calls:
            self.context.moved(node, created)
        self.context.fusions["chained"] += len(self.calls)
        if self.appended:
            self.context.fusions["appended"] += len(self.appended)

    def _steps(
        self, results: list[fx.Node], inputs: list[fx.Node], replaced: set[fx.Node]
    ) -> tuple[list[chains.Step], list[fx.Node]]:
        """The steps, and the nodes whose values the chain returns: others than ``replaced`` read them."""
        positions: dict[Any, int] = {node: position for position, node in enumerate(inputs)}
        positions[None] = chains.NONE
        steps, returned = [], []
        for node, result in zip(self.calls, results, strict=True):
            operands = list(node.args[:4])
            caching = self.appended.get(node)
            if caching is not None:
                steps.append(chains.Step(_append_call(caching, positions), False))
                _number(positions, caching.results)
                operands[:3] = caching.results
            is_returned = not replaced.issuperset(result.users)
            steps.append(chains.Step(_call(node, operands, positions), is_returned))
            _number(positions, (result,))
            returned += [result] if is_returned else []
        return steps, returned

    def _plain(self, inputs: list[fx.Node], steps: list[chains.Step], returned: list[fx.Node]) -> fx.Node:
        created = self.graph.call_function(CHAIN, (inputs, *chains.encode(steps)))
        created.meta = {**self.calls[0].meta, VALUE: [result.meta[VALUE] for result in returned]}
        for position, result in enumerate(returned):
            self._stand_in(self.graph.call_function(operator.getitem, (created, position)), result)
        return created

    def _caching(self, inputs: list[fx.Node], caches: list[fx.Node], steps: list[chains.Step], returned: list[fx.Node]) -> fx.Node:
        places = []
        for result in returned:
            value = result.meta[VALUE]
            places.append(
                self.graph.call_function(torch.empty, (tuple(value.shape),), {"dtype": value.dtype, "device": value.device})
            )
            self._stand_in(places[-1], result)
        starts = [each.keys.start for each in self.appended.values()]
        program, numbers, activations = chains.encode(steps)
        operands = (inputs, [*places, *caches], starts, [len(places), *program], numbers, activations)
        created = self.graph.call_function(CACHING_CHAIN, operands)
        created.meta = {**self.calls[0].meta, VALUE: None}
        return created

    def _stand_in(self, node: fx.Node, result: fx.Node) -> None:
        node.meta = dict(result.meta)
        result.replace_all_uses_with(node)


def _only_for(nodes: set[fx.Node]) -> set[fx.Node]:
    """``nodes``, and what is computed for them alone."""
    found, waiting = set(nodes), list(nodes)
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in found and found.issuperset(operand.users):
                found.add(operand)
                waiting.append(operand)
    return found


def _number(positions: dict[Any, int], results: tuple[fx.Node, ...]) -> None:
    """Give ``results`` the next positions; ``positions`` holds None too, which has none."""
    for result in results:
        positions[result] = len(positions) - 1


def _operands(node: fx.Node, caching: Appended | None = None) -> list[fx.Node | None]:
    """The constant tensors that a call reads, caches left out."""
    if caching is not None:
        return [*(heads.rows for heads in caching.sources), caching.cos, caching.sin, node.args[3]]  # type: ignore[list-item]
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


def _call(node: fx.Node, operands: list[Any], positions: dict[Any, int]) -> chains.Product | chains.Attention:
    """The call ``node``; ``operands`` are those of an attention."""
    if node.target is ATTENTION:
        query, key, value, mask = (positions[tensor] for tensor in operands)
        return chains.Attention(query, key, value, mask, node.args[4])  # type: ignore[arg-type]
    call = Call(*node.args)  # type: ignore[arg-type]
    at = {name: positions[vars(call)[name]] for name in ("x", "norm_weight", "residual")}
    weights, biases = (tuple(positions[tensor] for tensor in tensors) for tensors in (call.weights, call.biases))
    return chains.Product(**{**vars(call), **at, "weights": weights, "biases": biases, "rows": tuple(call.rows)})


def _append_call(caching: Appended, positions: dict[Any, int]) -> chains.Append:
    query, key, value = caching.sources
    columns = (query.column, key.column, value.column)
    tensors = (caching.cos, caching.sin, caching.keys.cache, caching.values.cache)
    cos, sin, keys, values = (positions[tensor] for tensor in tensors)
    sources = (positions[query.rows], positions[key.rows], positions[value.rows])
    return chains.Append(*sources, columns, cos, sin, keys, values, query.count)
