"""Activations that models write out, as GPT-2 and Bloom do GELU, whatever the order of their steps.

A node is told by the values that it gives: the steps between it and the one tensor that it comes from are run in float64 at points
all over the range where the function bends. Only smooth steps are taken, so two functions that agree there are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor._compat import no_modes
from kbit_inductor.passes.patterns import ADD, DIVIDE, MULTIPLY, is_constant

aten = torch.ops.aten
SMOOTH: Mapping[Any, Callable[..., Any]] = {
    **dict.fromkeys(ADD, operator.add), **dict.fromkeys(MULTIPLY, operator.mul), **dict.fromkeys(DIVIDE, operator.truediv),
    **dict.fromkeys((operator.pow, torch.pow, "pow", aten.pow.Tensor_Scalar), operator.pow),
    **dict.fromkeys((torch.tanh, functional.tanh, "tanh", aten.tanh.default), torch.tanh),
    **dict.fromkeys((torch.erf, "erf", aten.erf.default), torch.erf),
}  # fmt: skip
BENDS = (torch.tanh, torch.erf)
MOST_STEPS = 12
FORMS = ("tanh", "none")  # of GELU, as torch names them
CLOSE = 1e-7  # a constant of a model has 8 digits; float32 has 7


def spelled_gelu(node: fx.Node) -> tuple[str, fx.Node] | None:
    """``(form, x)`` when ``node`` is the GELU of that form of x, written out; else None."""
    if node.target not in MULTIPLY or not _is_smooth(node):
        return None
    steps = _steps(node)
    sources = {operand for step in steps for operand in step.all_input_nodes if operand not in steps}
    if len(sources) != 1 or not any(SMOOTH[step.target] in BENDS for step in steps):
        return None
    (x,) = sources
    with no_modes():
        points = torch.linspace(-6, 6, 97, dtype=torch.float64, device="cpu")
        given = _value(node, {x: points})
        for form in FORMS:
            if torch.allclose(given, functional.gelu(points, approximate=form), rtol=0, atol=CLOSE):
                return form, x
    return None


def _steps(node: fx.Node) -> list[fx.Node]:
    """``node`` and the smooth steps that are read for it alone; none if there are many."""
    found = [node]
    for step in found:
        for operand in step.all_input_nodes:
            if operand not in found and _is_smooth(operand) and set(operand.users) <= set(found):
                found.append(operand)
        if len(found) > MOST_STEPS:
            return []
    return found


def _is_smooth(node: fx.Node) -> bool:
    return node.target in SMOOTH and not node.kwargs and is_constant(node)


def _value(node: fx.Node, env: dict[fx.Node, Tensor]) -> Tensor:
    """What ``node`` gives, ``env`` being what is known."""
    if node not in env:
        operands = fx.node.map_arg(node.args, lambda operand: _value(operand, env))
        env[node] = SMOOTH[node.target](*operands)
    return env[node]
