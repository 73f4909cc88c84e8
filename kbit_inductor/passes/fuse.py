"""Fuse what surrounds the CPU's products into them: siblings, gates, activations, casts, residual sums, RMS norms in front.

Each step looks for one shape of graph around ``kbit::fused_linear_cpu`` and replaces it by a call that computes the same; the
operator's definition is in :mod:`kbit_inductor.lowering.cpu`. Only graphs without gradients are fused, since the fused operator has
none. How often each kind of fusion was done is counted in ``Context.fusions``.

Merging siblings and fusing a gate after the manner of vLLM's ``gate_up_proj`` and ``silu_and_mul``, without concatenating weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

from kbit_inductor.capture import VALUE, Context
from kbit_inductor.passes.call import ATTENTION, FUSED, Call
from kbit_inductor.passes.norms import rms_norm
from kbit_inductor.passes.patterns import (
    ADD,
    FLOATS,
    MULTIPLY,
    activation_of,
    alike,
    attention_arguments,
    cast_of,
    erase_dead,
    hoisted_bias,
    is_constant,
    is_float_product,
    unsliced,
    value_of,
)

LINEAR = torch.ops.kbit.linear_cpu.default
TILED_LINEAR = torch.ops.kbit.tiled_linear_cpu.default
SCALED_DOT_PRODUCTS = (functional.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


def fuse(context: Context) -> None:
    """Fuse all that can be fused, and count how often each kind of fusion was done."""
    found = (node for target in (LINEAR, TILED_LINEAR) for node in context.graph.find_nodes(op="call_function", target=target))
    products = [node for node in found if not context.is_inside_transform(node)]
    if torch.is_grad_enabled() or not products:
        return
    fusion = _Fusion(context)
    fusion.begin(products)
    for node in context.graph.find_nodes(op="call_function", target=FUSED):
        hoisted_bias(context.graph, node.args[4][0])  # a corrected one, which would stand between products
    for node in list(context.graph.nodes):
        if any(is_float_product(operand) for operand in node.all_input_nodes):
            fusion.residual(node)  # a side term, with which a product cannot be merged
    fusion.merge_siblings()
    for node in list(context.graph.nodes):
        fusion.gate(node)
    for node in list(context.graph.nodes):
        fusion.activation(node)
    for node in list(context.graph.nodes):
        fusion.cast_in_front(node)
        fusion.cast(node)
        fusion.residual(node)
    for node in list(context.graph.nodes):
        fusion.norm(node)
    for node in list(context.graph.nodes):
        fusion.attention(node)


class _Fusion:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.graph = context.graph
        self.done = context.fusions
        self.group_sizes: dict[fx.Node, int] = {}  # by packed weight

    def call(self, call: Call, meta_of: fx.Node, value: Any) -> fx.Node:
        """A new node for ``call`` at the insertion point, whose result is like ``value``."""
        node = self.graph.call_function(FUSED, tuple(vars(call).values()))
        node.meta = {**meta_of.meta, VALUE: value} if value is not None else dict(meta_of.meta)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.context.moved(old, new)

    def begin(self, products: list[fx.Node]) -> None:
        """Each of ``products`` as a call of the fused operator that fuses nothing."""
        for node in products:
            operands: Any = node.args
            x, weight, bias, rows, bits, *told = operands
            self.group_sizes[weight] = told[0] if told else self.group_size_of_slot(node, weight)
            call = Call(x, None, 0.0, [weight], [bias], [rows], "", False, None, bits)
            with self.graph.inserting_before(node):
                self.replace(node, self.call(call, node, node.meta.get(VALUE)))

    # q/k/v, gate/up: products of one x become one call, whose result is split.
    def merge_siblings(self) -> None:
        families: dict[Any, list[fx.Node]] = {}
        for node in self.graph.find_nodes(op="call_function", target=FUSED):
            call = Call.of(node)
            if call is not None and call.plain and all(hoisted_bias(self.graph, bias) for bias in call.biases):
                group_size = self.group_sizes[call.weights[0]]
                families.setdefault((call.x, call.activation_bits, group_size, node.meta[VALUE].dtype), []).append(node)
        for nodes in families.values():
            if len(nodes) > 1:
                self.merge(nodes)

    def group_size_of_slot(self, product: fx.Node, weight: Any) -> int:
        """The group size of a weight that this graph packs. All weights of a call must share theirs."""
        for slot, operands in zip(self.context.slots, self.context.operands, strict=True):
            if operands[0] is weight.meta[VALUE]:
                return slot.form.config.group_columns(next(use.columns for use, _ in self.context.choices if use.node is product))
        raise LookupError(f"{weight} is no packed weight")

    def merge(self, nodes: list[fx.Node]) -> None:
        calls = [call for node in nodes if (call := Call.of(node)) is not None]
        first = calls[0]
        merged = Call(
            first.x, None, 0.0, [c.weights[0] for c in calls], [c.biases[0] for c in calls], [c.rows[0] for c in calls], "", False,
            None, first.activation_bits,
        )  # fmt: skip
        with self.graph.inserting_before(nodes[0]):
            with self.context.fake_mode():
                value = torch.cat([node.meta[VALUE] for node in nodes], dim=-1)
            together = self.call(merged, nodes[0], value)
            start = 0
            for node, call in zip(nodes, calls, strict=True):
                part = self.graph.call_function(torch.narrow, (together, -1, start, call.rows[0]))
                part.meta = dict(node.meta)
                with self.context.fake_mode():
                    part.meta[VALUE] = torch.narrow(value, -1, start, call.rows[0])
                start += call.rows[0]
                node.replace_all_uses_with(part)
        for node in nodes:
            self.graph.erase_node(node)
            self.context.moved(node, together)
        self.done["siblings"] += len(nodes)

    # act(gate(x)) * up(x)
    def gate(self, node: fx.Node) -> None:
        if node.target not in MULTIPLY or len(node.args) != 2 or node.kwargs:
            return
        for activated, up in (node.args, node.args[::-1]):
            name = activation_of(activated)
            if name and self._gate(node, activated, up, name):  # type: ignore[arg-type]
                self.done["gate"] += 1
                return

    def _gate(self, node: fx.Node, activated: fx.Node, up: Any, name: str) -> bool:
        gate: Any = activated.args[0]
        if not (_is_half(gate, 0) and _is_half(up, 1) and gate.args[0] is up.args[0]):
            return False
        together: fx.Node = up.args[0]
        call = Call.of(together)
        if call is None or not call.plain or len(call.weights) != 2 or call.rows[0] != call.rows[1]:
            return False
        if not (_only_user(activated) is node and _only_user(up) is node and _only_user(gate) is activated):
            return False
        if set(together.users) != {gate, up}:
            return False
        call.activation, call.gated = name, True
        with self.graph.inserting_before(together):
            fused = self.call(call, node, node.meta[VALUE])
        node.replace_all_uses_with(fused)
        for dead in (node, activated, gate, up, together):
            self.graph.erase_node(dead)
        self.context.moved(together, fused)
        return True

    def take_in(self, kind: str, node: fx.Node, product: Any, call: Call) -> None:
        """Let ``call`` stand for ``product`` and for ``node``, the only one that reads it."""
        with self.graph.inserting_before(node):
            fused = self.call(call, node, node.meta[VALUE])
        self.replace(node, fused)
        self.graph.erase_node(product)
        self.context.moved(product, fused)
        self.done[kind] += 1

    # act(linear(x))
    def activation(self, node: fx.Node) -> None:
        name = activation_of(node)
        product: Any = node.args[0] if name else None
        call = Call.of(product)
        if call is None or not call.plain or len(call.weights) > 1 or _only_user(product) is not node:
            return
        call.activation = name or ""
        self.take_in("activation", node, product, call)

    # linear(x).to(dtype): rounded once, to the last dtype
    def cast(self, node: fx.Node) -> None:
        product = cast_of(node)
        call = Call.of(product)
        if call is None or call.dtype is not None or _only_user(product) is not node:
            return
        call.round_to(node.meta[VALUE].dtype)
        self.take_in("cast", node, product, call)

    # linear(x.to(dtype)), as autocast has it: the kernel rounds what it reads in any case
    def cast_in_front(self, node: fx.Node) -> None:
        call = Call.of(node)
        source = None if call is None else cast_of(call.x)
        if call is None or source is None or not is_constant(source) or call.activation_bits > 8 or _only_user(call.x) is not node:
            return
        cast, call.x = call.x, source
        call.round_to(node.meta[VALUE].dtype)
        with self.graph.inserting_before(node):
            self.replace(node, self.call(call, node, node.meta[VALUE]))
        erase_dead(self.graph, cast)
        self.done["cast"] += 1

    # residual + linear(x)
    def residual(self, node: fx.Node) -> None:
        if node.target not in ADD or len(node.args) != 2 or node.kwargs:
            return
        for product, other in (node.args, node.args[::-1]):
            call = Call.of(product)
            if call is None or call.residual is not None or _only_user(product) is not node or other is product:
                continue
            if not (_adds_to(product, other) and is_constant(other)) or (len(call.weights) > 1 and not call.gated):
                continue
            call.residual = other
            call.round_to(node.meta[VALUE].dtype)
            return self.take_in("residual", node, product, call)

    # linear(norm_weight * (x * rsqrt(mean(x ** 2) + eps)))
    def norm(self, node: fx.Node) -> None:
        call = Call.of(node)
        if call is None or call.norm_weight is not None or is_float_product(call.residual):
            return  # the float product reads the norm too, so it must be there
        found = rms_norm(unsliced(call.x))
        if found is None:
            return
        x, weight, eps = found
        normed = call.x
        call.x, call.norm_weight, call.eps = x, weight, eps
        with self.graph.inserting_before(node):
            self.replace(node, self.call(call, node, node.meta[VALUE]))
        erase_dead(self.graph, normed)
        self.done["norm"] += 1

    def attention(self, node: fx.Node) -> None:
        if node.target not in SCALED_DOT_PRODUCTS:
            return
        arguments = attention_arguments(node)
        if arguments is not None:
            with self.graph.inserting_before(node):
                created = self.graph.call_function(ATTENTION, arguments)
            created.meta = dict(node.meta)
            self.replace(node, created)
            self.done["attention"] += 1


def _is_half(node: Any, half: int) -> bool:
    """Whether ``node`` is the first or second half of what a merged call computes."""
    if not isinstance(node, fx.Node) or node.target is not torch.narrow:
        return False
    call = Call.of(node.args[0])
    return call is not None and len(call.rows) == 2 and bool(node.args[2] == half * call.rows[0])


def _adds_to(product: Any, other: Any) -> bool:
    """Whether their sum has the shape of both. The dtypes may differ: each is read in its own."""
    value = value_of(other)
    return value is not None and value.dtype in FLOATS and alike(product, other, dtypes=False)


def _only_user(node: Any) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
