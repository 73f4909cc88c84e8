"""What ``debug`` looks at after each pass: the graph is sound, its shapes are right, the pass kept its promise, and what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kbit_inductor._compat import OpOverload
from kbit_inductor.capture import VALUE, Context, tensors_of
from kbit_inductor.debug.trial import Trial, distance, identical, leaves, snapshot
from kbit_inductor.errors import BrokenPassError
from kbit_inductor.logs import logger
from kbit_inductor.passes.record import Pass
from kbit_inductor.weights.release import is_released

log = logger("passes")
MEANING = 2.0**-36
"""How far two graphs of one meaning may be apart in float64, relative. Its unit roundoff is 2 ** -53: seventeen bits are left to
sums of many terms and to layers after one another, and twelve bits lie between this and float32's own rounding."""
WORSE = 4.0
"""How many times the rounding error of the graph before a ``"bounded"`` pass may have: sums in another order, rounded elsewhere.

Where large terms cancel, the graph before may be right by luck. So no less is allowed than what rounding the inputs and weights
alone does to the result in exact arithmetic (backward error: Higham, Accuracy and Stability of Numerical Algorithms, 2002, 1.5)."""


class Inspector:
    """Checks a graph after each pass, on one set of random inputs.

    Args:
        inputs: what the graph is called with. Weights and integers are used as they are, other floats replaced by Gaussian ones.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.inputs = inputs

    def before(self, gm: fx.GraphModule, context: Context) -> None:
        """Run the captured graph."""
        self.operators = operators_of(gm)
        self.runnable = not any(is_released(value) for value in self.inputs if isinstance(value, Tensor))
        if not self.runnable:
            log.warning("passes are not checked on numbers: float weights were released")
            return
        gm.recompile()
        self.trial = Trial.of(gm, self.inputs)
        self._remember(gm, context, self.trial.run(gm, context), self.trial.exact(gm, context))
        self.sensitivity = distance(self.trial.perturbed().exact(gm, context), self.exact)

    def after(self, each: Pass, gm: fx.GraphModule, context: Context, seconds: float) -> None:
        """Check what ``each`` made of the graph.

        Raises:
            BrokenPassError: the graph is not sound, a value has another shape or dtype than its node says, or the pass did not keep
                what its tier promises.
        """
        _lint(each, gm)
        gm.recompile()
        error = self._check_numbers(each, gm, context) if self.runnable else None
        operators = operators_of(gm)
        changes = {name: (self.operators[name], operators[name]) for name in sorted({*self.operators, *operators})}
        told = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changes.items() if old != new) or "no operator changed"
        self.operators = operators
        log.info(
            "%s (%s), %.1f ms: %s%s", each.name, each.tier, 1e3 * seconds, told, "" if error is None else f"; moved by {error:.1e}"
        )

    def _remember(self, gm: fx.GraphModule, context: Context, actual: list[Any], exact: list[Any]) -> None:
        self.graph = snapshot(gm)
        self.actual, self.exact = actual, exact

    def _check_numbers(self, each: Pass, gm: fx.GraphModule, context: Context) -> float:
        self.trial.derive(context)
        self.trial.pack(context, self.inputs)
        values: dict[fx.Node, Any] = {}
        actual, exact = self.trial.run(gm, context, values), self.trial.exact(gm, context)
        _check_shapes(each, values)
        quantizing = each.tier == "quantizing"
        moved = distance(exact, self._expected(context) if quantizing else self.exact)
        if moved > MEANING:
            now: dict[str, Any] = {}
            then: dict[str, Any] = {}
            self.trial.exact(gm, context, now)
            self._expected(context, then)
            node = next((name for name in now if name in then and distance(leaves(now[name]), leaves(then[name])) > MEANING), None)
            raise BrokenPassError(
                each.name,
                f"is {each.tier}, but what the graph means moved by {moved:.1e} (relative, in float64; "
                f"{MEANING:.1e} is rounding), first at node {node!r}; kbit_inductor.bisect finds the layer",
            )
        if each.tier == "bitwise" and not identical(actual, self.actual):
            raise BrokenPassError(each.name, "is bitwise, but outputs have other bits; declare it bounded, or mend it")
        if each.tier == "bounded":
            self._check_rounding(each, actual, exact)
        self._remember(gm, context, actual, exact)
        return moved

    def _expected(self, context: Context, recorder: dict[str, Any] | None = None) -> list[Any]:
        """What the graph before means, on the weights that the packed ones stand for."""
        return self.trial.with_packed_weights(context).exact(self.graph, context, recorder)

    def _check_rounding(self, each: Pass, actual: list[Any], exact: list[Any]) -> None:
        floats = [value.dtype for value in actual if isinstance(value, Tensor) and value.is_floating_point()]
        unit = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
        before, after = distance(self.actual, self.exact), distance(actual, exact)
        if after > WORSE * max(before, unit, self.sensitivity):
            raise BrokenPassError(
                each.name,
                f"is bounded, but the error of rounding grew from {before:.1e} to {after:.1e}, more than {WORSE:.0f} times",
            )


def operators_of(gm: fx.GraphModule) -> Counter[str]:
    """How often each operator is called."""
    return Counter(_name(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method", "call_module"))


def _name(target: Any) -> str:
    if isinstance(target, (str, OpOverload)):
        return str(target)
    return str(getattr(target, "__name__", target))


def _lint(each: Pass, gm: fx.GraphModule) -> None:
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise BrokenPassError(each.name, f"left a graph that is not sound: {error}") from error


def _check_shapes(each: Pass, values: dict[fx.Node, Any]) -> None:
    """Whether each node gives what its fake value says; sizes that are symbolic are not compared."""
    for node, value in values.items():
        said, given = (
            tensors_of(node),
            [t for t in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(t, Tensor)],
        )
        if not said or VALUE not in node.meta:
            continue
        for fake, real in zip(said, given, strict=False):
            sizes = zip(fake.shape, real.shape, strict=False)
            if fake.dim() != real.dim() or fake.dtype != real.dtype or any(isinstance(f, int) and f != r for f, r in sizes):
                raise BrokenPassError(
                    each.name,
                    f"left node {node.name!r} with a value of {fake.dtype} {list(fake.shape)} where "
                    f"{real.dtype} {list(real.shape)} is computed; set node.meta[{VALUE!r}], or leave it out to have it inferred",
                )
