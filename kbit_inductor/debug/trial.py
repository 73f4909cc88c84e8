"""One set of inputs on which a graph is run, as it is and exactly, before and after it is rewritten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kbit_inductor._compat import copy_graph, hint, no_modes
from kbit_inductor.capture import Context
from kbit_inductor.debug.exact import Concrete, Exact, widen
from kbit_inductor.packing import PackedWeight
from kbit_inductor.weights.store import STORE


@dataclass
class Trial:
    """Values for the placeholders of a graph: weights and integers as they were given, Gaussian ones for other floats.

    Attributes:
        values: by name of a placeholder of the captured graph.
        packed: the packed weight of each slot, as far as the graph has them.
        exact_values: in float64, of the weights that a pass has made inputs of the graph.
    """

    values: dict[str, Any]
    packed: list[PackedWeight] = field(default_factory=list)
    exact_values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[Any]) -> Trial:
        """A trial for the captured graph ``gm`` and what it was called with."""
        generator = torch.Generator().manual_seed(0)
        with isolated():
            values = {
                node.name: value if _is_weight(node) else _random_like(value, generator)
                for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
            }
        return cls(values)

    def pack(self, context: Context, inputs: Sequence[Any]) -> None:
        """Pack what the graph's slots ask for and is not packed yet."""
        with isolated():
            for slot in context.slots[len(self.packed) :]:
                self.packed.append(STORE.find(inputs, slot) or slot.pack(inputs))

    def derive(self, context: Context) -> None:
        """Compute the weights that a pass has made inputs of the graph."""
        given = list(self.values.values())
        for weight in context.weights:
            derivation, name = weight.derivation, weight.node.name
            if derivation is not None and name not in self.values:
                self.values[name] = derivation.compute(given)
                with isolated():
                    sources = [widen(given[position].detach()) for position in derivation.sources]
                    self.exact_values[name] = Exact(derivation.graph, {}).run(*sources)

    def run(self, gm: fx.GraphModule, context: Context, recorder: dict[fx.Node, Any] | None = None) -> list[Any]:
        """What ``gm`` returns and writes to its inputs; the value of each node goes to ``recorder``."""
        arguments = self._arguments(gm, self.values)
        with isolated():
            return [*leaves(_Recording(gm, recorder).run(*arguments)), *self._written(arguments)]

    def exact(self, gm: fx.GraphModule, context: Context, recorder: dict[str, Any] | None = None) -> list[Any]:
        """What ``gm`` returns and writes in float64, with the weights that packed ones stand for."""
        dense = {id(one.operands[0]): one.coded.dequantize(torch.float64) for one in self.packed}
        with isolated():
            arguments = [widen(argument) for argument in self._arguments(gm, {**self.values, **self.exact_values})]
            return [*leaves(Exact(gm, dense, recorder).run(*arguments)), *self._written(arguments)]

    def with_packed_weights(self, context: Context) -> Trial:
        """This trial with each weight as its packed forms stand for it, in float64: the input of a graph that packs none."""
        values = {**self.values, **self.exact_values}
        copied: set[str] = set()
        with isolated():
            names = {(weight.argument, weight.derivation): weight.node.name for weight in context.weights}
            for slot, packed in zip(context.slots, self.packed, strict=True):
                name = names[slot.argument, slot.derivation]
                if name not in copied:
                    values[name] = values[name].detach().to(torch.float64, copy=True)
                    copied.add(name)
                slot.form.view.assign(values[name], packed.dequantize(torch.float64))
        return Trial(values, self.packed)

    def perturbed(self) -> Trial:
        """This trial with each float off by one unit in its last place, up or down, in float64."""
        generator = torch.Generator().manual_seed(1)

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            signs = torch.randint(2, value.shape, generator=generator).to(value.device) * 2 - 1
            return widen(value.detach()) * (1 + signs * torch.finfo(value.dtype).eps)

        with isolated():
            return Trial({name: moved(value) for name, value in self.values.items()}, self.packed)

    def _arguments(self, gm: fx.GraphModule, values: Mapping[str, Any]) -> list[Any]:
        """A copy of each value, since a graph may write to what it is given; packed operands themselves."""
        packed = [operand for one in self.packed for operand in one.inputs]
        placeholders = gm.graph.find_nodes(op="placeholder")
        known = [node for node in placeholders if node.name in values]
        given = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), [values[node.name] for node in known])
        return [*given, *(packed if len(known) < len(placeholders) else ())]

    def _written(self, arguments: Sequence[Any]) -> list[Tensor]:
        """Those of the copies that the graph wrote to. Packed operands are none; packing wrote to them."""
        packed = {id(operand) for one in self.packed for operand in one.inputs}
        return [value for value in arguments if isinstance(value, Tensor) and value._version > 0 and id(value) not in packed]


class _Recording(Concrete):
    """Runs a graph as it is."""

    def __init__(self, gm: fx.GraphModule, recorder: dict[fx.Node, Any] | None) -> None:
        super().__init__(gm)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.recorder is not None:
            self.recorder[n] = value
        return value


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Real tensors, no gradients, and a random state of its own."""
    with no_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def snapshot(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` as it is now."""
    return copy_graph(gm)


def leaves(result: Any) -> list[Any]:
    """The outputs of a graph, one by one."""
    return pytree.tree_leaves(result)


def distance(actual: Sequence[Any], expected: Sequence[Any]) -> float:
    """The largest relative error ``‖a - e‖ / ‖e‖`` of any output, infinite where one is another kind of thing than expected."""
    if len(actual) != len(expected):
        return float("inf")
    return max((_distance(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)


def _distance(actual: Any, expected: Any) -> float:
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if actual == expected else float("inf")
    if actual.shape != expected.shape:
        return float("inf")
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual.to(expected.dtype), expected) else float("inf")
    a, e = widen(actual), widen(expected)
    same = (a == e) | (a.isnan() & e.isnan())
    difference = torch.where(same, 0, a - e)
    if not bool(torch.isfinite(torch.view_as_real(difference) if difference.is_complex() else difference).all()):
        return float("inf")
    size = float(torch.where(torch.isfinite(e), e, 0).abs().pow(2).sum().sqrt())
    error = float(difference.abs().pow(2).sum().sqrt())
    return error / size if size else error


def identical(actual: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether all outputs are of one dtype and equal bit for bit, NaN being equal to NaN."""
    pairs = list(zip(actual, expected, strict=False))
    return len(actual) == len(expected) and all(_identical(a, e) for a, e in pairs)


def _identical(a: Any, e: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(e, Tensor):
        return bool(a == e)
    return a.shape == e.shape and a.dtype == e.dtype and bool(((a == e) | ((a != a) & (e != e))).all())


def _is_weight(node: fx.Node) -> bool:
    """Whether Dynamo says that the input is a parameter or buffer."""
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _random_like(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, torch.SymInt):
        return hint(value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        return value  # an integer may be an index; a number without dimensions a momentum or an epsilon
    # By its storage, since elements may share memory.
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    drawn = torch.randn(extent if value.numel() else 0, generator=generator).to(value)
    return drawn.as_strided(value.shape, value.stride())
