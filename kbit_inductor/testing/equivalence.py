"""Whether a compiled model is the model, but for what quantizing changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kbit_inductor import backend
from kbit_inductor.config import Config
from kbit_inductor.debug.exact import Exact, widen
from kbit_inductor.debug.inspector import WORSE
from kbit_inductor.debug.trial import distance, isolated, leaves
from kbit_inductor.packing import PackedWeight, pack
from kbit_inductor.testing.bounds import Grid
from kbit_inductor.testing.nodes import Checking, NodeError
from kbit_inductor.testing.oracles import dequantized_copy
from kbit_inductor.testing.quantizers import NO_WORSE
from kbit_inductor.testing.rewriting import Rewritten, fresh_call, rewrite
from kbit_inductor.weights.store import STORE, Slot


def assert_equivalent(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    config: Config | Mapping[str, Any] | None = None,
    *,
    through_inductor: bool = True,
    dynamic: bool | None = None,
) -> None:
    """Compare ``model``, compiled, with itself.

    1. Each packed weight with the float one: the squared error is at most twice that of rounding to nearest.
    2. Each packed operator, on the values that reach it, with its definition in float64: a bound from K, dtypes and the step of
       rounded activations.
    3. What the graph means before and after each pass, in float64, with weights as packed ones stand for them.
    4. The compiled model with the eager one with dequantized weights: its error from float64 is at most four times that of the
       rewritten graph run operator by operator.

    Args:
        model: in ``eval()``.
        inputs: its arguments, or the one that it has.
        config: the options.
        through_inductor: whether to do the last, which takes seconds.
        dynamic: as in ``torch.compile``.

    Raises:
        AssertionError: it is not; the message names the layer, node or pass, and the line that shows it again.
        LookupError: no weight was packed, so nothing was compared.
    """
    resolved = dataclasses.replace(Config.from_options(config), debug=True)
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    graphs = rewrite(model, *arguments, config=resolved, dynamic=dynamic)  # 3, by debug
    if not any(graph.context.slots for graph in graphs):
        raise LookupError("no weight of the model is packed; kbit_inductor.explain says why")
    for graph in graphs:
        packed = [_find(graph, slot) for slot in graph.context.slots]
        for slot, one in zip(graph.context.slots, packed, strict=True):
            _check_weight(slot, one, graph.inputs)
        _check_nodes(graph, packed, resolved)
    if through_inductor:
        _check_compiled(model, arguments, graphs, resolved, dynamic)


def _find(graph: Rewritten, slot: Slot) -> PackedWeight:
    return STORE.find(graph.inputs, slot) or slot.pack(graph.inputs)


def _again(config: Config) -> str:
    ours = dataclasses.replace(config, debug=False)
    changed = {f.name: v for f in dataclasses.fields(Config) if (v := getattr(ours, f.name)) != getattr(Config(), f.name)}
    return f"; again: kbit_inductor.testing.assert_equivalent(model, inputs, {changed})"


def _check_weight(slot: Slot, packed: PackedWeight, inputs: Sequence[Any]) -> None:
    with isolated():
        matrix = slot.matrix(inputs)
        squared = float((packed.dequantize(torch.float64) - matrix.double()).square().sum())
        plain = pack(matrix, dataclasses.replace(slot.form.config, quantizer="rtn")).dequantize(torch.float64)
        norm = float(matrix.double().square().sum())
        allowed = NO_WORSE * float((plain - matrix.double()).square().sum()) + 2.0**-20 * norm
    # What is calibrated trades error of the weight for error of its output.
    if slot.calibration is None and squared > allowed:
        raise AssertionError(f"layer {slot.name!r} is packed with squared error {squared:.3g}, above {allowed:.3g}; is it stale?")


def _check_nodes(graph: Rewritten, packed: Sequence[PackedWeight], config: Config) -> None:
    grids = {id(one.operands[0]): _grids(one) for one in packed}
    alive = {node.name for node in graph.graph.graph.find_nodes(op="placeholder")}
    names = [node.name for node in graph.captured.graph.find_nodes(op="placeholder")]
    with isolated():
        kept = pytree.tree_map_only(
            Tensor, lambda t: t.detach().clone(), [v for n, v in zip(names, graph.inputs, strict=True) if n in alive]
        )
        graph.graph.recompile()
        try:
            Checking(graph.graph, grids).run(*kept, *(operand for one in packed for operand in one.inputs))
        except NodeError as error:
            raise AssertionError(f"{error} ({_layers(graph, error.node)}){_again(config)}") from None


def _grids(packed: PackedWeight) -> Any:
    if packed.batch is None:
        return Grid.of(packed)
    matrices = zip(*packed.operands, strict=True)
    return [Grid.of(dataclasses.replace(packed, operands=each, batch=None)) for each in matrices]


def _layers(graph: Rewritten, node: str) -> str:
    names = dict.fromkeys(use.weight.name for use, _ in graph.context.choices if use.node.name == node)
    return f"layers {', '.join(names)}" if names else "no weight"


def _check_compiled(
    model: nn.Module, inputs: tuple[Any, ...], graphs: Sequence[Rewritten], config: Config, dynamic: bool | None
) -> None:
    plain = dataclasses.replace(config, debug=False)

    def interpreted(gm: fx.GraphModule, given: Sequence[Any]) -> Any:
        rewritten, context = backend.capture(gm, given, plain)
        return backend.Bound(rewritten.forward, backend.kept_arguments(context, len(given)), tuple(context.slots))

    def compiled(gm: fx.GraphModule, given: Sequence[Any]) -> Any:
        return backend.kbit(gm, given, options=plain)

    def exactly(gm: fx.GraphModule, given: Sequence[Any]) -> Any:
        """In float64 what the rewritten graph means: no eager twin has a place for weights that are packed as they are computed."""
        rewritten, context = backend.capture(gm, given, plain)
        kept = backend.kept_arguments(context, len(given))

        def run(*arguments: Any) -> Any:
            packed = STORE.packed(arguments, context.slots)
            dense = {id(one.operands[0]): one.coded.dequantize(torch.float64) for one in packed}
            operands = (widen(operand) for one in packed for operand in one.inputs)
            return Exact(rewritten, dense).run(*(widen(arguments[i]) for i in kept), *operands)

        return run

    results = []
    state = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for each in (interpreted, compiled):
        copies = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), list(inputs))
        with torch.no_grad():
            results.append(leaves(torch.compile(fresh_call(model), backend=each, dynamic=dynamic)(*copies)))
            for buffer, before in state:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    computed = any(slot.derivation is not None for graph in graphs for slot in graph.context.slots)
    twin = torch.compile(fresh_call(model), backend=exactly, dynamic=dynamic) if computed else dequantized_copy(model).double()
    with torch.no_grad():
        wide = widen if not computed else lambda value: value
        exact = leaves(twin(*pytree.tree_map_only(Tensor, lambda tensor: wide(tensor.detach().clone()), list(inputs))))
    unit = max((torch.finfo(v.dtype).eps for v in results[0] if isinstance(v, Tensor) and v.is_floating_point()), default=0.0)
    expected, actual = (distance(result, exact) for result in results)
    if actual > WORSE * max(expected, 4 * unit):
        raise AssertionError(
            f"the compiled model is {actual:.2e} away from float64, the same graph operator by operator "
            f"{expected:.2e}{_again(config)}"
        )
