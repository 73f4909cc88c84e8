"""Low-rank adapters (LoRA: Hu et al., 2021) beside a product, ``linear(x, W) + linear(linear(x, A), B) * s``, get 8 bits.

They are a small part of the weights and all that was trained. Nothing else is done here: the passes after this one fold s into B,
compute A's product with W's, which reads the same x, and add the sum in B's. So an adapter costs one call more than none.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from kbit_inductor.capture import Context, Memory
from kbit_inductor.kernels.layout import MAX_BITS
from kbit_inductor.passes.patterns import ADD, LINEARS, MULTIPLY, value_of
from kbit_inductor.passes.products import linear_operands


def widen_adapters(context: Context) -> None:
    """Give the weights of adapters the most bits, but where ``overrides`` or a plan have set theirs."""
    for node in context.graph.nodes:
        for weight in _adapter(context, node):
            located = context.locate(weight)
            if located is None or context.config.pinned_bits(located[0].name) is not None:
                continue
            old = located[0]
            if old.config is None:
                continue
            new = dataclasses.replace(old, config=dataclasses.replace(old.config, bits=MAX_BITS))
            context.weights[context.weights.index(old)] = new
            for storage, memory in context.memories.items():
                if memory.weight is old:
                    context.memories[storage] = Memory(new, memory.view, memory.layout, memory.value)


def _adapter(context: Context, up: fx.Node) -> tuple[fx.Node, ...]:
    """A and B, if ``up`` is the second product of an adapter; else nothing."""
    second = linear_operands(up)
    first = linear_operands(second[0]) if second else None
    if first is None or second is None:
        return ()
    (x, a), b = first, second[1]
    narrow, wide = value_of(a), value_of(b)
    if narrow is None or wide is None or narrow.dim() != 2:
        return ()
    term = _only_reader(up)
    if term is not None and term.target in MULTIPLY:
        up, term = term, _only_reader(term)
    if term is None or term.target not in ADD or 2 * narrow.shape[0] > min(narrow.shape[1], wide.shape[0]):
        return ()
    others = [other for other in term.all_input_nodes if other is not up]
    return (a, b) if len(others) == 1 and _is_product(others[0]) and others[0].args[:1] == (x,) else ()


def _is_product(node: fx.Node) -> bool:
    """Whether ``node`` multiplies by a weight, one that ``quantize_`` has packed among them."""
    return node.target in LINEARS or getattr(node.target, "namespace", "") == "kbit"


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
