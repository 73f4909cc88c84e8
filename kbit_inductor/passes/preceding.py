"""What a graph computes just before its products, where that can take over a scale of their input's channels exactly.

``(x / s) @ (W * s).T`` is ``x @ W.T``: a norm's weight and bias, or the rows of a product, take the division, through what keeps
positive factors: ReLU, and products with something else (SmoothQuant: Xiao et al., 2022; AWQ: Lin et al., 2023). All that reads x
must be a product, and each parameter used once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.nn import functional

from kbit_inductor.passes.norms import rms_norm
from kbit_inductor.passes.patterns import ACTIVATIONS, DROPOUTS, LINEARS, MULTIPLY, is_constant, is_off, value_of
from kbit_inductor.passes.products import linear_operands

LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
NOT_FOLDED = "what it is multiplied with comes from no norm and no product that could be scaled"


@dataclass(frozen=True)
class Preceding:
    """Products of one x, and what could be divided in their place.

    Attributes:
        weights: placeholders of the matrices ``[N, K]``.
        sources: placeholders of vectors ``[K]`` and of matrices ``[K, …]``, each row of which belongs to a channel of x.
        reason: why there are none, or "".
    """

    weights: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]
    reason: str = ""


def preceding(graph: fx.Graph) -> Iterator[Preceding]:
    """That of each x that products of ``graph`` read, in order."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        operands = linear_operands(node)
        if operands is None or operands[1].op != "placeholder" or operands[0] in seen:
            continue
        x = operands[0]
        seen.add(x)
        found = [other for reader in x.users if (other := linear_operands(reader)) is not None and other[0] is x]
        weights = tuple(weight for _, weight in found if weight.op == "placeholder")
        if len(found) < len(x.users) or not all(_is_used_once(weight) for _, weight in found):
            yield Preceding(weights, (), "what it is multiplied with, or its weight, is used by something else too")
            continue
        sources = _sources(x)
        yield Preceding(weights, sources, "" if sources else NOT_FOLDED)


def _sources(x: Any) -> tuple[fx.Node, ...]:
    """The parameters that each scale a channel of what ``x`` gives; none where there are none such."""
    if (norm := rms_norm(x, halves=True)) is not None:
        return _once(norm[1])
    if not isinstance(x, fx.Node):
        return ()
    if x.target is functional.layer_norm:
        given = dict(zip(LAYER_NORM, x.args, strict=False)) | dict(x.kwargs)
        return _once(given.get("weight"), given.get("bias")) if given.get("weight") is not None else ()
    if x.target in LINEARS:
        given = dict(zip(("input", "weight", "bias"), x.args, strict=False)) | dict(x.kwargs)
        return _once(given.get("weight"), given.get("bias"))
    if x.target in MULTIPLY and not x.kwargs:
        parts = (_sources(part) for part in x.args if _is_read_by(part, x) and _same_channels(part, x))
        return next((part for part in parts if part), ())
    keeps = x.target in ACTIVATIONS["relu"] or (x.target in DROPOUTS and is_off(x))
    return _sources(x.args[0]) if keeps and _is_read_by(x.args[0], x) else ()


def _once(*parameters: Any) -> tuple[fx.Node, ...]:
    """``parameters``, those that are not None, if each is an input with as many rows and used once."""
    present = tuple(each for each in parameters if each is not None)
    sizes = {value.shape[0] for each in present if (value := value_of(each)) is not None and value.dim()}
    inputs = all(isinstance(each, fx.Node) and each.op == "placeholder" and _is_used_once(each) for each in present)
    return present if inputs and len(sizes) == 1 else ()


def _is_used_once(node: fx.Node) -> bool:
    return len(node.users) == 1 and is_constant(node)


def _is_read_by(node: Any, reader: fx.Node) -> bool:
    return isinstance(node, fx.Node) and set(node.users) == {reader} and is_constant(node)


def _same_channels(part: Any, x: fx.Node) -> bool:
    a, b = value_of(part), value_of(x)
    return a is not None and b is not None and a.dim() > 0 and str(a.shape[-1]) == str(b.shape[-1])
