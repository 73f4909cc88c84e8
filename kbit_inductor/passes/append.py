"""What a decoding step does before its attention: heads of new queries, keys and values, turned by their positions, and a cache
that the keys and values are written to.

Found here, as transformers spells it; :mod:`kbit_inductor.passes.chain` makes it a step of a chain. Nothing else of the graph may
touch the caches: only then may what writes to them move.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kbit_inductor.capture import VALUE
from kbit_inductor.passes.patterns import ADD, MULTIPLY, is_constant, value_of

ALL = slice(None, None, None)
NEGATE = (operator.neg, torch.neg, "neg")
CATENATE = (torch.cat, torch.concat)
TRANSPOSE = ("transpose", torch.transpose)
SPLIT = ("view", "reshape", "unflatten", torch.reshape, torch.unflatten)


@dataclass(frozen=True)
class Heads:
    """Heads side by side in ``rows``, ``[B, M, columns]``, from ``column`` on; ``size`` columns each."""

    rows: fx.Node
    column: int
    count: int
    size: int


@dataclass(frozen=True)
class Turned:
    """Heads, turned by angles ``[B or 1, M, D]`` if there are any."""

    heads: Heads
    cos: fx.Node | None
    sin: fx.Node | None


@dataclass(frozen=True)
class Write:
    """``cache[:, :, start:end] = new`` and then ``filled = cache[:, :, :end]``, all that the graph does with the cache."""

    cache: fx.Node
    node: fx.Node
    new: fx.Node
    start: Any
    filled: fx.Node


@dataclass(frozen=True)
class Appended:
    """The operands of an attention, as ``kbit::append_cpu`` makes them."""

    query: fx.Node
    keys: Write
    values: Write
    sources: tuple[Heads, Heads, Heads]
    cos: fx.Node | None
    sin: fx.Node | None

    @property
    def results(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The nodes whose values the operator gives: queries, and the keys and values of all tokens so far."""
        return self.query, self.keys.filled, self.values.filled


def appended(attention: fx.Node, order: dict[fx.Node, int]) -> Appended | None:
    """What makes the operands of ``attention``, a node of ``attention_cpu``, if it is what the operator does.

    Args:
        attention: the node.
        order: the position of each node in the graph.
    """
    query: Any = attention.args[0]
    keys, values = (_write(node, order) for node in attention.args[1:3])
    if keys is None or values is None or keys.start is not values.start or keys.cache is values.cache or len(query.users) != 1:
        return None
    turned, key, value = _turned(query), _turned(keys.new), _turned(values.new)
    if turned is None or key is None or value is None or value.cos is not None:
        return None
    if (turned.cos, turned.sin) != (key.cos, key.sin):
        return None
    return Appended(query, keys, values, (turned.heads, key.heads, value.heads), turned.cos, turned.sin)


def _write(filled: Any, order: dict[fx.Node, int]) -> Write | None:
    if not _is_call(filled, operator.getitem) or len(filled.users) != 1:
        return None
    cache, index = filled.args
    write: Any = next((user for user in cache.users if user is not filled), None)
    if cache.op != "placeholder" or len(cache.users) != 2 or not _is_call(write, operator.setitem) or write.users:
        return None
    target, place, new = write.args
    if target is not cache or order[write] > order[filled] or not isinstance(new, fx.Node) or not _fits(cache, new):
        return None
    begin, end = _tokens(place), _tokens(index)
    if begin is None or end is None or end[0] is not None or begin[1] is not end[1]:
        return None
    start, tokens = begin[0], new.meta[VALUE].shape[2]
    return Write(cache, write, new, start, filled) if _is_sum(end[1], start, tokens) else None


def _fits(cache: fx.Node, new: fx.Node) -> bool:
    """Whether ``new`` are rows of ``cache``, which lie in one piece each."""
    a, b = value_of(cache), value_of(new)
    if a is None or b is None or a.dim() != 4 or b.dim() != 4 or a.dtype != b.dtype or a.device.type != "cpu":
        return False
    same = all(isinstance(a.shape[i], int) and a.shape[i] == b.shape[i] for i in (0, 1, 3))
    return same and isinstance(b.shape[2], int) and a.stride(3) == 1


def _tokens(index: Any) -> tuple[Any, Any] | None:
    """Start and end of ``[:, :, start:end]``."""
    if not isinstance(index, tuple) or len(index) != 3 or index[:2] != (ALL, ALL):
        return None
    last = index[2]
    return (last.start, last.stop) if isinstance(last, slice) and last.step in (None, 1) else None


def _is_sum(end: Any, start: Any, tokens: int) -> bool:
    if isinstance(end, int) and isinstance(start, int):
        return start >= 0 and end == start + tokens
    return _is_call(end, *ADD) and tuple(end.args) in ((start, tokens), (tokens, start))


def _turned(node: Any) -> Turned | None:
    """``x * cos + cat([-x2, x1]) * sin`` with the halves of x, or x alone."""
    heads = _heads(node)
    if heads is not None:
        return Turned(heads, None, None)
    if not _is_call(node, *ADD) or len(node.args) != 2 or node.kwargs or not is_constant(node):
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        for x, cos in _factors(straight):
            for swapped, sin in _factors(crossed):
                if _is_swapped(swapped, x) and (heads := _heads(x)) is not None:
                    angles = [_angles(each, node) for each in (cos, sin)]
                    if None not in angles:
                        return Turned(heads, *angles)
    return None


def _factors(node: Any) -> tuple[tuple[Any, Any], ...]:
    if not _is_call(node, *MULTIPLY) or len(node.args) != 2 or node.kwargs:
        return ()
    return (node.args, node.args[::-1])


def _angles(node: Any, turned: fx.Node) -> fx.Node | None:
    """What is the same for all heads of ``turned``, without the dimension of heads."""
    added = (1,) if _is_call(node, "unsqueeze", torch.unsqueeze) else ((ALL, None),) if _is_call(node, operator.getitem) else None
    if added is None or node.args[1:] != added:
        return None
    angles: Any = node.args[0]
    a, x = value_of(angles), turned.meta[VALUE]
    fits = a is not None and a.dtype == x.dtype and tuple(a.shape) in ((1, *x.shape[2:]), (x.shape[0], *x.shape[2:]))
    return angles if fits else None


def _is_swapped(node: Any, x: Any) -> bool:
    """Whether ``node`` is ``cat([-x[..., half:], x[..., :half]], -1)``."""
    value = value_of(x)
    if value is None or not _is_call(node, *CATENATE) or not is_constant(node):
        return False
    parts, dim = node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    half, odd = divmod(value.shape[-1], 2)
    if odd or len(parts) != 2 or dim not in (-1, value.dim() - 1) or not _is_call(parts[0], *NEGATE):
        return False
    second, first = parts[0].args[0], parts[1]
    return _is_part(second, x, slice(half, None, None)) and _is_part(first, x, slice(None, half, None))


def _is_part(node: Any, x: fx.Node, part: slice) -> bool:
    return _is_call(node, operator.getitem) and node.args == (x, (Ellipsis, part))


def _heads(node: Any) -> Heads | None:
    """``rows[..., column : column + H * D].view(B, M, H, D).transpose(1, 2)``."""
    if not _is_call(node, *TRANSPOSE) or {dim % 4 for dim in node.args[1:]} != {1, 2} or not is_constant(node):
        return None
    split = node.args[0]
    if not _is_call(split, *SPLIT):
        return None
    rows = split.args[0]
    shape, flat = split.meta[VALUE].shape, value_of(rows)
    if flat is None or len(shape) != 4 or flat.dim() != 3 or not all(isinstance(size, int) for size in (*shape, *flat.shape)):
        return None
    if tuple(flat.shape) != (*shape[:2], shape[2] * shape[3]):
        return None
    column = 0
    if _is_call(rows, torch.narrow) and rows.args[1] in (-1, 2):
        rows, column = rows.args[0], rows.args[2]
    return Heads(rows, column, shape[2], shape[3])


def _is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets
