"""Turn marked products into ``kbit::`` operators: pick the kernel, make the packed weight an input of the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from kbit_inductor._compat import mark_static_input
from kbit_inductor.capture import VALUE, Context, Use
from kbit_inductor.config import LayerConfig
from kbit_inductor.lowering.registry import Choice, Problem, choose
from kbit_inductor.packing import operand_specs
from kbit_inductor.store import Slot, form
from kbit_inductor.views import WeightView

aten = torch.ops.aten


@dataclass
class Lowered:
    """The packed weights that a rewritten graph takes, after its other inputs, and the kernel of each use."""

    slots: list[Slot] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    choices: list[tuple[Use, Choice]] = field(default_factory=list)


def lower_marks(context: Context) -> Lowered:
    """Replace every mark by the operator of its kernel. Equal views of one weight share a packed weight."""
    lowered = Lowered()
    inputs: dict[tuple[int, WeightView, LayerConfig], list[fx.Node]] = {}
    for use in context.uses:
        layer = _config(use)
        key = (use.weight.argument, use.view, layer)
        if key not in inputs:
            inputs[key] = _add_inputs(context, use, lowered)
        _replace(context, use, inputs[key], lowered)
    return lowered


def _config(use: Use) -> LayerConfig:
    if use.weight.config is None:
        raise LookupError(f"{use.weight.name} was matched although it stays in float")
    return use.weight.config


def _add_inputs(context: Context, use: Use, lowered: Lowered) -> list[fx.Node]:
    """New placeholders, after all others, for the operands of a packed weight."""
    layer = _config(use)
    lowered.slots.append(Slot(use.weight.argument, use.weight.name, form(use.view, layer)))
    nodes = []
    for position, (shape, dtype) in enumerate(operand_specs(use.rows, use.columns, layer)):
        with context.fake_mode():
            value = torch.empty(shape, dtype=dtype, device=use.weight.value.device)
        with context.graph.inserting_after(context.graph.find_nodes(op="placeholder")[-1]):
            node = context.graph.placeholder(f"packed_{len(lowered.slots) - 1}_{position}")
        node.meta[VALUE] = value
        mark_static_input(node)
        lowered.values.append(value)
        nodes.append(node)
    return nodes


def _replace(context: Context, use: Use, operands: list[fx.Node], lowered: Lowered) -> None:
    layer = _config(use)
    dtype: Any = use.node.args[-1]
    problem = Problem(
        family=use.family,
        device=use.weight.value.device.type,
        dtype=dtype,
        rows=use.rows,
        columns=use.columns,
        bits=layer.bits,
        group_size=layer.group_columns(use.columns),
    )
    choice = choose(problem)
    planes, scale, *offset, global_scale = operands
    packed = (planes, scale, offset[0] if offset else None, global_scale)
    arguments: tuple[Any, ...]
    with context.graph.inserting_before(use.node):
        if use.family == "linear":
            x, _, bias, _ = use.node.args
            arguments = (_cast(context, x, dtype), *packed, bias, problem.group_size)
        else:
            arguments = (use.node.args[0], *packed, use.columns, problem.group_size, dtype)
        created = context.graph.call_function(choice.overload(use.family), arguments)
    created.meta = dict(use.node.meta)
    use.node.replace_all_uses_with(created)
    context.graph.erase_node(use.node)
    use.node = created
    lowered.choices.append((use, choice))


def _cast(context: Context, x: Any, dtype: torch.dtype) -> Any:
    """``x`` in the dtype in which the product is computed, which autocast may have made another than its own."""
    value = x.meta.get(VALUE)
    if isinstance(value, Tensor) and value.dtype == dtype:
        return x
    return context.graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
