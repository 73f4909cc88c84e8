"""Weights that the graph computes from parameters alone: each becomes an input of the graph, as if it were a parameter.

It stays an input only until the product that takes it is packed; :mod:`kbit_inductor.passes.cleanup` puts back what was not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor._compat import OpOverload, mark_static_input, storage_id, trace
from kbit_inductor.capture import VALUE, Context, GraphWeight, Memory, ineligible, layer_name
from kbit_inductor.config import LayerConfig
from kbit_inductor.given_grid import GivenGrid
from kbit_inductor.passes.patterns import LINEARS, is_constant, is_number, number_of
from kbit_inductor.passes.products import rule_of
from kbit_inductor.passes.scheme import grid_of
from kbit_inductor.weights.derivation import Derivation
from kbit_inductor.weights.views import Strides, WeightView

SPELLED = (
    *LINEARS, functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul,
    torch.mm, torch.bmm, torch.addmm, torch.einsum, torch.functional.einsum, "matmul", "mm", "bmm",
)  # fmt: skip
COMPUTED = "its product takes a weight that is computed in the forward pass"


def derive_weights(context: Context) -> bool:
    """Make inputs of the weights that products take and that are computed from parameters; whether there are any."""
    constants = constant_nodes(context)
    derived: dict[fx.Node, fx.Node | None] = {}
    for node in list(context.graph.nodes):
        if node in constants or not _is_product(node):
            continue
        for operand in node.all_input_nodes:
            if operand in constants and operand.op != "placeholder" and context.weight_of(operand) is None:
                if operand not in derived:
                    derived[operand] = _derive(context, operand, constants)
                if (placeholder := derived[operand]) is not None:
                    node.replace_input_with(operand, placeholder)
    return any(derived.values())


def explain_computed_weights(context: Context) -> None:
    """Say which products have a weight that the graph computes from parameters, and so could not be matched."""
    constants = constant_nodes(context)
    by_node = {weight.node: weight for weight in context.weights}
    for node in context.graph.nodes:
        if node in constants or not _is_product(node):
            continue
        for operand in node.all_input_nodes:
            if operand in constants and operand.op != "placeholder" and context.weight_of(operand) is None:
                for source in constants[operand]:
                    if source in by_node:
                        context.explain(by_node[source], COMPUTED)


def constant_nodes(context: Context) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that read parameters and numbers alone, each with the parameters that it comes from.

    A product or look-up that will be packed is none: it is computed from what the packed weight stands for. A product of low rank,
    ``B @ A``, or one that gives a vector, is one: to store what it gives takes less than to compute it.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in context.graph.nodes:
        operands = [operand for operand in node.all_input_nodes if not is_number(operand)]
        if node.op == "placeholder":
            if _is_parameter(node) and is_constant(node):
                found[node] = [node]
        elif operands and all(operand in found for operand in operands) and (_only_computes(node) or _is_low_rank(node)):
            found[node] = list(dict.fromkeys(source for operand in operands for source in found[operand]))
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """``node`` and all that it is computed from."""
    found, waiting = set(), [node]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting.extend(each.all_input_nodes)
    return found


def _is_parameter(node: fx.Node) -> bool:
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _is_product(node: fx.Node) -> bool:
    return node.target in SPELLED or getattr(node.target, "__name__", "") == "matmul" or rule_of(node) is not None


def _only_computes(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and not _is_product(node)


def _is_low_rank(node: fx.Node) -> bool:
    """Whether ``node`` is a product with fewer terms than its result has rows or columns, or one that gives a vector."""
    value, *sides = (each.meta.get(VALUE) for each in (node, *node.all_input_nodes))
    matrices = [side for side in sides if isinstance(side, Tensor) and side.is_floating_point() and side.dim() in (1, 2)]
    if not _is_product(node) or not isinstance(value, Tensor) or len(matrices) != len(sides) or len(sides) != 2:
        return False
    terms = math.isqrt(matrices[0].numel() * matrices[1].numel() // max(value.numel(), 1))
    return value.dim() < 2 or (value.dim() == 2 and terms < min(value.shape))


def _derive(context: Context, node: fx.Node, constants: dict[fx.Node, list[fx.Node]]) -> fx.Node | None:
    """An input in the place of ``node``, known as a weight; None when it cannot be computed apart, or stays in float anyway."""
    value, sources = node.meta.get(VALUE), set(constants[node])
    weights = [weight for weight in context.weights if weight.node in sources and weight.derivation is None]
    grid = grid_of(node)
    owner = max(weights, key=lambda weight: weight.value.numel(), default=None) if grid is None else _on_grid(context, node, grid)
    if owner is None or owner.config is None or not isinstance(value, Tensor) or value.dim() < 2 or not is_constant(node):
        return None
    if not value.is_floating_point() or ineligible(value, context.config):
        return None
    ordered = [owner.node, *(source for source in constants[node] if source is not owner.node)]
    graph = _recipe(node, ordered, constants)
    if graph is None:
        return None
    positions = {placeholder: i for i, placeholder in enumerate(context.graph.find_nodes(op="placeholder"))}
    derivation = Derivation(tuple(positions[source] for source in ordered), graph, grid)
    placeholder = _placeholder(context, value)
    fake = placeholder.meta[VALUE]
    weight = GraphWeight(placeholder, owner.argument, owner.name, owner.config, derivation=derivation, computed=node)
    context.weights.append(weight)
    context.memories[storage_id(fake)] = Memory(weight, WeightView(), Strides.of(fake), fake)
    return placeholder


def _on_grid(context: Context, node: fx.Node, grid: GivenGrid) -> GraphWeight | None:
    """What ``node`` puts on ``grid``, as a weight of as many bits: the codes of a dequantized one are no float parameter."""
    codes: Any = node.args[0]
    if codes.op != "placeholder":
        return None
    name, _ = layer_name(codes)
    layer = context.config.for_layer(name)
    if layer is None:
        return None
    config = LayerConfig(grid.bits, grid.group_size, quantizer="rtn", activation_bits=layer.activation_bits)
    return GraphWeight(codes, context.graph.find_nodes(op="placeholder").index(codes), name, config)


def _recipe(node: fx.Node, sources: list[fx.Node], constants: dict[fx.Node, list[fx.Node]]) -> fx.GraphModule | None:
    """What computes ``node`` from ``sources``, if it only computes: nothing written or drawn at random."""
    steps = [step for step in node.graph.nodes if step in constants and step.op != "placeholder"]
    steps = steps[: steps.index(node) + 1]
    numbers = {each: number_of(each) for each in ancestors(node) if is_number(each)}

    def compute(*given: Tensor) -> Any:
        env: dict[fx.Node, Any] = {**numbers, **dict(zip(sources, given, strict=True))}
        for step in steps:
            if all(operand in env for operand in step.all_input_nodes):
                args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda operand: env[operand])
                method = step.op == "call_method"
                env[step] = getattr(args[0], str(step.target))(*args[1:], **kwargs) if method else step.target(*args, **kwargs)
        return env[node]

    traced = trace(compute, [source.meta[VALUE] for source in sources])
    traced.graph.eliminate_dead_code()
    result: Any = traced.graph.output_node().args[0]
    value, expected = result.meta["val"], node.meta[VALUE]
    if value.dtype != expected.dtype or value.shape != expected.shape:  # autocast, which the recipe is run without
        return None
    if not all(_is_pure(step) for step in traced.graph.nodes if step.op not in ("placeholder", "output")):
        return None
    return _without_values(traced)


def _without_values(traced: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``traced`` that holds no fake tensors. A graph remembers the nodes that were erased from it, so it is a new one."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    for node in graph.nodes:
        node.meta.clear()
    return fx.GraphModule(traced, graph)


def _is_pure(step: fx.Node) -> bool:
    target = step.target
    if not isinstance(target, OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _placeholder(context: Context, value: Tensor) -> fx.Node:
    """A new input after all others, like ``value`` in memory of its own."""
    last = context.graph.find_nodes(op="placeholder")[-1]
    with context.graph.inserting_after(last):
        node = context.graph.placeholder(f"derived_{sum(weight.derivation is not None for weight in context.weights)}")
    with context.fake_mode():
        node.meta[VALUE] = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    mark_static_input(node)
    return node
