"""RMS norms, as transformers and torch spell them in a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from kbit_inductor.capture import VALUE
from kbit_inductor.passes.patterns import ADD, CASTS, FLOATS, MULTIPLY, alike, is_constant, number_of, value_of

aten = torch.ops.aten


def rms_norm(node: Any, halves: bool = False) -> tuple[fx.Node, fx.Node, float] | None:
    """``(x, weight, eps)`` when ``node`` is the RMS norm of x over its last dimension, as transformers and torch spell it.

    With ``halves`` that of a float16 or bfloat16 x too, computed in float32, whose roundings between its steps are then lost.
    """
    if not isinstance(node, fx.Node):
        return None
    if node.target is functional.rms_norm or node.target is torch.rms_norm:
        return _torch_rms_norm(node, halves)
    weight, scaled = _pair(node, MULTIPLY, lambda n: isinstance(n, fx.Node) and n.op == "placeholder")
    scaled = _uncast(scaled, halves)
    x, inverse = _pair(scaled, MULTIPLY, lambda n: not _is_rsqrt(n))
    if weight is None or x is None or not _is_rsqrt(inverse):
        return None
    mean, eps = _pair(inverse.args[0], ADD, lambda n: _is_mean_square(n, x, halves))
    return None if mean is None else _norm_of(node, _uncast(x, halves), weight, eps, halves)


def _torch_rms_norm(node: fx.Node, halves: bool) -> tuple[fx.Node, fx.Node, float] | None:
    arguments = dict(zip(("input", "normalized_shape", "weight", "eps"), node.args, strict=False)) | dict(node.kwargs)
    x, weight, eps = arguments.get("input"), arguments.get("weight"), arguments.get("eps")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return _norm_of(node, x, weight, eps, halves)


def _norm_of(node: fx.Node, x: Any, weight: Any, eps: Any, halves: bool) -> tuple[fx.Node, fx.Node, float] | None:
    """The norm that ``node`` is, if all of it is of one dtype: float32, or with ``halves`` any."""
    if not (is_constant(x) and is_constant(weight)):
        return None
    a, b = x.meta[VALUE], weight.meta[VALUE]
    fits = alike(node, x) and a.dtype == b.dtype and a.dtype in (FLOATS if halves else (torch.float32,)) and b.dim() == 1
    if not fits or a.shape[-1] != b.shape[0] or (number := number_of(eps)) is None:
        return None
    return x, weight, number


def _pair(node: Any, targets: tuple[Any, ...], first: Callable[[Any], bool]) -> tuple[Any, Any]:
    """The two operands of ``node`` if it is one of ``targets``, the one that satisfies ``first`` in front; else two None."""
    if not isinstance(node, fx.Node) or node.target not in targets or len(node.args) != 2 or node.kwargs:
        return None, None
    a, b = node.args
    if first(a):
        return a, b
    return (b, a) if first(b) else (None, None)


def _is_rsqrt(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (torch.rsqrt, "rsqrt", aten.rsqrt.default)


def _is_mean_square(node: Any, x: fx.Node, halves: bool) -> bool:
    if not isinstance(node, fx.Node) or node.target not in ("mean", torch.mean, aten.mean.dim):
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    square = node.args[0]
    if dims not in (-1, [-1], (-1,)) or keeps is not True or not isinstance(square, fx.Node):
        return False
    is_square = square.target in ("pow", torch.pow, operator.pow, aten.pow.Tensor_Scalar) and square.args[1:] == (2,)
    return is_square and _uncast(square.args[0], halves) is _uncast(x, halves)


def _uncast(node: Any, halves: bool) -> Any:
    """What ``node`` casts, when the cast changes nothing: Dynamo records ``x.to(float32)`` of a float32 tensor too.

    With ``halves`` also between floats.
    """
    while isinstance(node, fx.Node) and node.target in CASTS and isinstance(node.args[0], fx.Node):
        value, source = value_of(node), value_of(node.args[0])
        between = halves and value is not None and source is not None and {value.dtype, source.dtype} <= set(FLOATS)
        if not (between or alike(node, node.args[0])):
            break
        node = node.args[0]
    return node
