"""Turn marked products into ``kbit::`` operators: pick the kernel, make the packed weight an input of the graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from kbit_inductor._compat import mark_static_input
from kbit_inductor.capture import VALUE, Context, Use
from kbit_inductor.config import LayerConfig
from kbit_inductor.kernel_registry import kernels
from kbit_inductor.kernels.layout import TILED_LAYOUTS
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import Choice, choose
from kbit_inductor.lowering.requirements import fp8_problem
from kbit_inductor.packing import operand_specs, plane_operands
from kbit_inductor.passes.values import call_fake
from kbit_inductor.side import Side, side_specs, with_shift, with_term
from kbit_inductor.weights.store import Form, Slot, form

aten = torch.ops.aten


def lower_marks(context: Context) -> None:
    """Replace every mark by the operator of its kernel. Equal views of one weight share a packed weight."""
    inputs: dict[tuple[int, Form], Inputs] = {}
    for use in context.uses:
        choice = _choose(context, use)
        use.m = _rows_of_x(use)
        calibration = context.config.calibration
        derivation = use.weight.derivation
        known = calibration and calibration.key
        packed_form = form(use.view, _stored(context, use, choice), choice.kernel.layout, known, derivation and derivation.key)
        key = (use.weight.argument, packed_form)
        if key not in inputs:
            inputs[key] = _add_inputs(context, use, packed_form)
        _replace(context, use, choice, inputs[key])
        context.choices.append((use, choice))


class Inputs(NamedTuple):
    """The placeholders of a packed weight: of its operands, and of its side term."""

    operands: list[fx.Node]
    side: Side | None


def _config(use: Use) -> LayerConfig:
    if use.weight.config is None:
        raise LookupError(f"{use.weight.name} was matched although it stays in float")
    return use.weight.config


def _stored(context: Context, use: Use, choice: Choice) -> LayerConfig:
    """How the weight is stored: only the CPU's kernel of one matrix reads a cascade, and only a product of one has a side term."""
    config = _config(use).storage()
    if use.family != "linear" and config != config.without_side:
        context.explain(use.weight, "no floats beside its codes: it is " + ("looked up" if use.batch is None else "a batch"))
        config = config.without_side
    if not config.cascade or (choice.kernel.layout == "tiled" and use.batch is None):
        return config
    context.explain(
        use.weight, f"no cascade: kernel {choice.kernel.name} reads all bits of {'a' if use.batch is None else 'each'} matrix"
    )
    return dataclasses.replace(config, cascade=False)


def _choose(context: Context, use: Use) -> Choice:
    layer = _config(use)
    choice = choose(
        Problem(
            family=use.family,
            device=use.weight.value.device.type,
            dtype=use.node.args[-1],  # type: ignore[arg-type]
            rows=use.rows,
            columns=use.columns,
            bits=layer.bits,
            group_size=layer.group_columns(use.columns),
            uniform=layer.levels() is None,
            activation_bits=_activation_bits(use),
            device_index=use.weight.value.device.index or 0,
            symmetric=layer.symmetric,
            cascade=layer.cascade and use.batch is None,
            matrices=1 if use.batch is None else use.batch,
        ),
        kernels(),
    )
    if not choice.kernel.rounds and layer.activation_bits not in ("auto", 16):
        context.explain(use.weight, f"activations stay in float: kernel {choice.kernel.name} takes no activation_bits")
    if layer.activation_bits == "fp8" and (slower := _no_fp8(use, choice)) is not None:
        context.explain(use.weight, slower)
    return choice


def _no_fp8(use: Use, choice: Choice) -> str | None:
    """What is done in place of products of 8-bit floats, where there are none."""
    device = use.weight.value.device
    if device.type == "cpu":
        return "activations are rounded to integers of 8 bits, not to 8-bit floats: the weight is on a CPU"
    why = fp8_problem(device.index or 0)
    return None if why is None or not choice.kernel.rounds else f"8-bit floats are multiplied as float16, which is slower: {why}"


def _activation_bits(use: Use) -> int:
    return _config(use).activation_bits_on(use.weight.value.device.type)


def _rows_of_x(use: Use) -> int | torch.SymInt | None:
    x = use.node.args[0]
    value = x.meta.get(VALUE) if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    return math.prod(value.shape if use.family == "embedding" else value.shape[:-1])


def _add_inputs(context: Context, use: Use, packed_form: Form) -> Inputs:
    """New placeholders, after all others, for a packed weight."""
    weight, calibration, config = use.weight, context.config.calibration, packed_form.config
    context.slots.append(Slot(weight.argument, weight.name, packed_form, calibration=calibration, derivation=weight.derivation))
    operands = operand_specs(use.rows, use.columns, config, packed_form.layout, use.batch)
    side = side_specs(use.rows, use.columns, config, use.weight.value.dtype)
    nodes = _placeholders(context, use, [*operands, *side.values()])
    return Inputs(nodes[: len(operands)], Side.of(dict(zip(side, nodes[len(operands) :], strict=True))))


def _placeholders(context: Context, use: Use, specs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[fx.Node]:
    nodes = []
    for position, (shape, dtype) in enumerate(specs):
        with context.fake_mode():
            value = torch.empty(shape, dtype=dtype, device=use.weight.value.device)
        with context.graph.inserting_after(context.graph.find_nodes(op="placeholder")[-1]):
            node = context.graph.placeholder(f"packed_{len(context.slots) - 1}_{position}")
        node.meta[VALUE] = value
        mark_static_input(node)
        nodes.append(node)
    context.operands.append(tuple(node.meta[VALUE] for node in nodes))
    return nodes


def _replace(context: Context, use: Use, choice: Choice, inputs: Inputs) -> None:
    dtype: Any = use.node.args[-1]
    operands, side, call = inputs.operands, inputs.side or Side(), _caller(context, use)
    with context.graph.inserting_before(use.node):
        if use.family == "linear":
            given, _, bias, _ = use.node.args
            x = _cast(context, given, dtype)
            bias = with_shift(call, bias, side.shift)
            arguments = _linear_arguments(use, choice, x, operands, bias)
        elif use.batch is not None:
            x, _, where, _ = use.node.args
            arguments = _batch_arguments(use, choice, _cast(context, x, dtype), operands, where)
        else:
            arguments = _embedding_arguments(use, choice, operands, dtype)
        created = context.graph.call_function(choice.overload(use.family), arguments)
        created.meta = dict(use.node.meta)
        whole = created if side.up is None else with_term(call, created, x, *_multiplied(context, side, dtype))
    use.node.replace_all_uses_with(whole)
    context.graph.erase_node(use.node)
    use.node = created


def _caller(context: Context, use: Use) -> Callable[..., fx.Node]:
    """Adds a call to the graph, with what is known of the matched node, and a fake value where its operands have theirs."""

    def call(target: Callable[..., Any], *arguments: Any) -> fx.Node:
        node = context.graph.call_function(target, arguments)
        node.meta = {key: value for key, value in use.node.meta.items() if key != VALUE}
        if all(VALUE in operand.meta for operand in node.all_input_nodes):
            node.meta[VALUE] = call_fake(context, node)
        return node

    return call


def _multiplied(context: Context, side: Side, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """What x is multiplied by, its matrices in ``dtype``."""
    down, up = (None if part is None else _cast(context, part, dtype) for part in (side.down, side.up))
    return down, side.columns, up


def _linear_arguments(use: Use, choice: Choice, x: Any, operands: list[fx.Node], bias: Any) -> tuple[Any, ...]:
    layer = _config(use)
    if choice.kernel.layout in TILED_LAYOUTS:
        return x, operands[0], bias, use.rows, _activation_bits(use)
    *packed, codebook = plane_operands(operands, layer)
    rounding = (_activation_bits(use),) if choice.kernel.rounds else ()
    if choice.kernel.layout == "words":
        return x, *packed, bias, layer.bits, layer.group_columns(use.columns), codebook, *rounding
    return x, *packed, bias, layer.group_columns(use.columns), codebook, *rounding


def _batch_arguments(use: Use, choice: Choice, x: Any, operands: list[fx.Node], where: Any) -> tuple[Any, ...]:
    layer = _config(use)
    if choice.kernel.layout in TILED_LAYOUTS:
        return x, operands[0], where, use.rows, _activation_bits(use)
    *packed, codebook = plane_operands(operands, layer)
    if choice.kernel.layout == "words":
        return x, *packed, where, layer.bits, layer.group_columns(use.columns), codebook, _activation_bits(use)
    return x, *packed, where, layer.group_columns(use.columns), codebook


def _embedding_arguments(use: Use, choice: Choice, operands: list[fx.Node], dtype: torch.dtype) -> tuple[Any, ...]:
    indices = use.node.args[0]
    if choice.kernel.layout in TILED_LAYOUTS:
        return indices, operands[0], use.columns, dtype
    layer = _config(use)
    *packed, codebook = plane_operands(operands, layer)
    if choice.kernel.layout == "words":
        return indices, *packed, use.columns, layer.bits, layer.group_columns(use.columns), dtype, codebook
    return indices, *packed, use.columns, layer.group_columns(use.columns), dtype, codebook


def _cast(context: Context, x: Any, dtype: torch.dtype) -> Any:
    """``x`` in the dtype in which the product is computed, which autocast may have made another than its own."""
    value = x.meta.get(VALUE)
    if isinstance(value, Tensor) and value.dtype == dtype:
        return x
    node = context.graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    if isinstance(value, Tensor):
        node.meta[VALUE] = call_fake(context, node)
    return node
