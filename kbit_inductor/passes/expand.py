"""Take apart the calls that use a weight, so that every spelling of a product becomes one of a few ATen operators.

``addmm``, ``einsum``, ``matmul``, ``tensordot``, ``multi_head_attention_forward``, …: each is traced by itself on its fake
operands, and the ATen nodes take its place when a product is among them. All other nodes stay as Dynamo wrote them, so a graph
costs no second trace and keeps its gradient and autocast regions.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from kbit_inductor._compat import HigherOrderOperator, storage_id, trace
from kbit_inductor.capture import VALUE, Context, GraphWeight, Memory, tensors_of
from kbit_inductor.passes.patterns import LINEARS
from kbit_inductor.passes.products import EMBEDDINGS, rule_of
from kbit_inductor.weights.views import Strides

aten = torch.ops.aten
SELECTIONS = (aten.index.Tensor, aten.index_select.default)
COPIES = (aten._to_copy.default, aten.clone.default)
# A view is chosen for the strides of fake values, which are not always those of the real ones (`x.type(dtype)` of an expanded x).
RESHAPES = (aten.view.default, aten._unsafe_view.default)
VIEWS = (
    aten.alias.default, aten.as_strided.default, aten.detach.default, aten.expand.default, aten.permute.default,
    aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.t.default,
    aten.transpose.int, aten.unsqueeze.default, aten.view.default, aten._unsafe_view.default,
)  # fmt: skip


def expand_weight_calls(context: Context) -> None:
    """Replace every call that multiplies by a weight through a composite operator with the ATen nodes it consists of."""
    spared = context.spared()
    for node in list(context.graph.nodes):
        if node in spared or node.op not in ("call_function", "call_method") or node.target in (*LINEARS, *EMBEDDINGS):
            continue
        weights = [weight for operand in node.all_input_nodes if (weight := context.weight_of(operand)) is not None]
        if not weights or context.is_view(node) or context.is_inside_transform(node):
            continue
        if isinstance(node.target, HigherOrderOperator):
            for weight in weights:
                context.explain(weight, f"used inside the region of {node.target.name()}")
        elif _outputs(node) is not None:
            _expand(context, node, weights)


def _outputs(node: fx.Node) -> list[Tensor] | None:
    """The tensors that ``node`` returns; None when there are none, or when they cannot be replaced one by one."""
    if not isinstance(node.meta.get(VALUE), Tensor) and any(user.target is not operator.getitem for user in node.users):
        return None
    return tensors_of(node) or None


def _expand(context: Context, node: fx.Node, weights: list[GraphWeight]) -> None:
    traced = _trace_call(node)
    calls = [inner for inner in traced.graph.nodes if inner.op == "call_function"]
    if any(rule_of(inner) is not None for inner in calls):
        _inline(context, node, traced)
    elif (picked := _picked(node, traced, calls)) is not None and context.select(node, *picked):
        return
    elif calls and all(inner.target in (*COPIES, *VIEWS) for inner in calls) and isinstance(node.meta[VALUE], Tensor):
        _remember_copy(context, node)
    else:
        for weight in weights:
            context.explain(weight, f"used by {_name(node.target)}, which is no matrix product")


def _picked(node: fx.Node, traced: fx.GraphModule, calls: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The batch of matrices and the index, operands of ``node``, if all it does is to pick matrices: ``W[index]``."""
    if len(calls) != 1 or calls[0].target not in SELECTIONS or not isinstance(node.meta[VALUE], Tensor):
        return None
    batch, *rest = calls[0].args
    index = rest[0] if calls[0].target is aten.index.Tensor else [rest[1]] if rest[0] == 0 else []
    outer = dict(zip(traced.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    if not isinstance(index, (list, tuple)) or len(index) != 1 or batch not in outer or index[0] not in outer:
        return None
    if outer[index[0]].meta[VALUE].dtype not in (torch.int32, torch.int64):
        return None
    return outer[batch], outer[index[0]]


def _trace_call(node: fx.Node) -> fx.GraphModule:
    """``node`` alone as an ATen graph. Dynamo saw the dtype that autocast made it return, so autocast is put back here."""
    operands = node.all_input_nodes
    values = [operand.meta[VALUE] for operand in operands]

    def call(*given: Any) -> Any:
        env = dict(zip(operands, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: env[operand])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    wanted = (_outputs(node) or [])[0]
    inputs = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    autocast = wanted.dtype in (torch.bfloat16, torch.float16) and wanted.dtype not in inputs
    with torch.autocast(wanted.device.type, wanted.dtype if autocast else None, enabled=autocast), _without_onednn():
        return trace(call, values)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Without oneDNN's LSTM, which is one operator, an LSTM is traced as its products."""
    backend: Any = torch.backends.mkldnn
    before = backend.enabled
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before


def _inline(context: Context, node: fx.Node, traced: fx.GraphModule) -> None:
    """Put the nodes of ``traced`` in the place of ``node``."""
    env: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with context.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                copied = context.graph.node_copy(inner, lambda operand: env[operand])
                copied.meta = {**node.meta, VALUE: inner.meta.get("val")}
                if inner.target in RESHAPES:
                    copied.target = aten.reshape.default
                env[inner] = copied
                if inner.target in COPIES:
                    _remember_copy(context, copied)
    result = traced.graph.output_node().args[0]
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(env[result])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(env[result[user.args[1]]])  # type: ignore[index]
            context.graph.erase_node(user)
    context.graph.erase_node(node)


def _remember_copy(context: Context, node: fx.Node) -> None:
    """Know the result of a cast or clone of a weight as that weight's values in memory of their own."""
    source = node.all_input_nodes[0]
    weight, located, value = context.weight_of(source), context.locate(source), node.meta[VALUE]
    if weight is None:
        return
    if not value.is_floating_point() or value.dtype == torch.float64:
        context.explain(weight, f"used as {value.dtype}")
        return
    if located is None:
        context.copy_selection(node, source)
        return
    _, view, memory, window = located
    if tuple(value.shape) != window.size or value.device != weight.value.device:
        return
    context.memories[storage_id(value)] = Memory(weight, view.then(memory, window), Strides.of(value), value)


def _name(target: object) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
