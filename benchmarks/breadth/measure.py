"""One row of the table: a model compiled with kbit beside itself in eager with the weights that the packed ones stand for."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from breadth.products import ConstantProducts
from breadth.twin import twin
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kbit_inductor import backend
from kbit_inductor._compat import graph_breaks
from kbit_inductor.config import Config
from kbit_inductor.debug.trial import distance, leaves

UNIT_ROUNDOFF = 2.0**-24  # of float32
# Activations stay in float: then all that a compiled model differs by is the order of float32 sums.
OPTIONS: dict[str, Any] = {"min_elements": 0, "activation_bits": 16}


@dataclass(frozen=True)
class Way:
    """How a model is compiled: bits, ``dynamic`` of ``torch.compile``, and whether Inductor compiles what the passes made."""

    bits: int
    dynamic: bool | None = None
    inductor: bool = False

    @property
    def name(self) -> str:
        return f"{self.bits} bits{', dynamic' if self.dynamic else ''}{', Inductor' if self.inductor else ''}"


class Recorder:
    """A backend that runs the rewritten graph operator by operator or through Inductor, and keeps what the passes did."""

    def __init__(self, model: nn.Module, config: Config, inductor: bool) -> None:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.names = {id(t): name.removesuffix(".weight") for name, t in tensors}
        self.sizes = {name.removesuffix(".weight"): t.numel() for name, t in tensors}
        self.config = config
        self.inductor = inductor
        self.graphs = 0
        self.uses: Counter[str] = Counter()
        self.fusions: Counter[str] = Counter()
        self.reasons: dict[str, list[str]] = {}
        self.terms: list[int] = []
        self.computed = False
        self.counting = True
        self.captured: Counter[tuple[str, frozenset[str]]] = Counter()
        self.left: Counter[tuple[str, frozenset[str]]] = Counter()

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        rewritten, context = backend.capture(gm, inputs, self.config)
        self.uses.update(use.family for use, _ in context.choices)
        self.fusions += context.fusions
        self.reasons |= context.reasons
        self.terms += [use.columns for use, _ in context.choices]
        self.computed |= any(slot.derivation is not None for slot in context.slots)
        if self.inductor:
            return backend.kbit(gm, inputs, options=self.config)
        call: Callable[..., Any] = rewritten.forward
        if context.slots:
            call = backend.Bound(call, backend.kept_arguments(context, len(inputs)), tuple(context.slots))
        return lambda *arguments: self._counted(gm.forward, call, arguments)

    def _counted(self, before: Callable[..., Any], after: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """The result of ``after``; the constant products of both are counted."""
        if not self.counting:
            return after(*arguments)
        copies = pytree.tree_map_only(Tensor, lambda t: t if isinstance(t, nn.Parameter) else t.clone(), list(arguments))
        with torch.random.fork_rng(devices=[]), ConstantProducts(self._constants(arguments, copies)) as captured:
            before(*copies)
        with ConstantProducts(self._constants(arguments, arguments)) as left:
            result = after(*arguments)
        self.captured += captured.found
        self.left += left.found
        return result

    def _constants(self, arguments: Sequence[Any], given: Sequence[Any]) -> dict[str, Tensor]:
        """Those of ``given`` that stand for the model's parameters and buffers, by name."""
        return {self.names[id(old)]: new for old, new in zip(arguments, given, strict=True) if id(old) in self.names}

    @property
    def bound(self) -> float:
        """A sum of K terms in another order differs by at most K unit roundoffs, and what one product is off passes through those
        after it."""
        return sum(self.terms) * UNIT_ROUNDOFF

    def unmatched(self) -> list[dict[str, Any]]:
        """Products that stay in float: operator, weights, multiply–adds, how many numbers the weights are, and why."""
        return [
            {
                "operator": operator,
                "weights": sorted(names),
                "multiply_adds": count,
                "parameters": sum(self.sizes[name] for name in names),
                "reasons": sorted({reason for name in names for reason in self.reasons.get(name, [])}),
            }
            for (operator, names), count in self.left.most_common()
        ]


@torch.no_grad()
def measure(model: nn.Module, inputs: dict[str, Any], way: Way) -> dict[str, Any]:
    """What is matched, and how far the compiled model is from eager on dequantized weights."""
    config = Config.from_options({"bits": way.bits, **OPTIONS})
    torch.manual_seed(0)
    with ConstantProducts(dict([*model.named_parameters(), *model.named_buffers()])) as eager:
        expected = model(**inputs)
    recorder = Recorder(model, config, way.inductor)
    result, breaks, graphs = _run(model, inputs, recorder, way.dynamic)
    unmatched = recorder.unmatched()
    recompiled = recorder.graphs - graphs
    if breaks or recompiled:
        counter = _Count()
        _, of_eager, graphs_of_eager = _run(model, inputs, counter, way.dynamic)
        breaks, recompiled = breaks - of_eager, recompiled - (counter.graphs - graphs_of_eager)

    def capture(compiler: Any, given: dict[str, Any]) -> Any:
        return _run(model, given, compiler, way.dynamic, again=False)[0]

    reference = twin(model, config, recorder.computed, capture)
    torch.manual_seed(0)
    exact = reference(**inputs)
    captured, left = sum(recorder.captured.values()), sum(row["multiply_adds"] for row in unmatched)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "graphs": graphs,
        "graph_breaks": breaks,
        "recompiles": recompiled,
        "total": max(sum(eager.found.values()), captured),
        "matched": captured - left,
        "uses": dict(recorder.uses),
        "fusions": dict(recorder.fusions),
        "unmatched": unmatched,
        "error": distance(leaves(result), leaves(exact)),
        "moved": distance(leaves(exact), leaves(expected)),
        "bound": recorder.bound,
    }


class _Count:
    """A backend that counts graphs and runs them as they are."""

    graphs = 0
    counting = False

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.graphs += 1
        return gm.forward


def _run(model: nn.Module, inputs: dict[str, Any], compiler: Any, dynamic: bool | None, again: bool = True) -> tuple[Any, int, int]:
    """The result of ``model`` compiled by ``compiler``, the graph breaks and the graphs of the call.

    ``again``: it is called once more, with another batch size where sizes are dynamic. Behind a code object of its own each time,
    since Dynamo counts by code object.
    """

    def call(**keywords: Any) -> Any:
        return model(**keywords)

    fresh = types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    torch._dynamo.reset()
    before = sum(graph_breaks().values())
    compiled = torch.compile(fresh, backend=compiler, dynamic=dynamic)
    torch.manual_seed(0)
    result = compiled(**inputs)
    breaks, graphs = sum(graph_breaks().values()) - before, getattr(compiler, "graphs", 0)
    if again:
        compiler.counting = False
        compiled(**_grown(inputs) if dynamic else inputs)
    return result, breaks, graphs


def _grown(inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` with their last entry twice."""
    return {key: torch.cat([value, value[-1:]]) if isinstance(value, Tensor) else value for key, value in inputs.items()}
