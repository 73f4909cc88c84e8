"""What ``kbit::chain_cpu`` computes: products and attention one after the other, in one call.

An operator takes lists of numbers and not of steps, so steps are written as numbers. A step names its tensors by their position:
first come the inputs of the chain, then its caches, then the results of its steps, in order.

``kbit::caching_chain_cpu`` computes chains that append to caches. What it writes, its results and then the caches, are arguments: a
custom operator that mutates some may return no list of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1  # the position of a tensor that is not there
Position = int


@dataclass(frozen=True)
class Product:
    """A call of ``kbit::fused_linear_cpu``, whose arguments have these names."""

    x: Position
    norm_weight: Position
    eps: float
    weights: tuple[Position, ...]
    biases: tuple[Position, ...]
    rows: tuple[int, ...]
    activation: str
    gated: bool
    residual: Position
    activation_bits: int
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Attention:
    """A call of ``kbit::attention_cpu`` whose result is laid out as ``[B, M, H * D]``."""

    query: Position
    key: Position
    value: Position
    mask: Position
    scale: float


@dataclass(frozen=True)
class Append:
    """A call of ``kbit::append_cpu`` but for its ``start``, which may be symbolic. Its results are three, and never returned:
    queries, and the keys and values of all tokens so far."""

    query: Position
    key: Position
    value: Position
    columns: tuple[int, int, int]
    cos: Position
    sin: Position
    keys: Position
    values: Position
    heads: int


Call = Product | Attention | Append
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS: tuple[type[Call], ...] = (Attention, Product, Append)


@dataclass(frozen=True)
class Step:
    """A call in a chain.

    Attributes:
        call: what is computed.
        returned: whether the chain returns it; what only later steps read is not.
    """

    call: Call
    returned: bool


def encode(steps: Sequence[Step]) -> tuple[list[int], list[float], list[str]]:
    """``program, numbers, activations``: the last arguments of the operator."""
    program: list[int] = []
    for step in steps:
        call = step.call
        program += [KINDS.index(type(call)), step.returned, *_operands(call)]
    numbers = [_number(step.call) for step in steps]
    activations = [step.call.activation if isinstance(step.call, Product) else "" for step in steps]
    return [int(number) for number in program], numbers, activations


def _operands(call: Call) -> list[int]:
    if isinstance(call, Product):
        rows = [number for row in zip(call.weights, call.biases, call.rows, strict=True) for number in row]
        dtype = NONE if call.dtype is None else DTYPES.index(call.dtype)
        return [call.x, call.activation_bits, call.norm_weight, call.residual, call.gated, dtype, len(call.weights), *rows]
    if isinstance(call, Attention):
        return [call.query, call.key, call.value, call.mask]
    sources = zip((call.query, call.key, call.value), call.columns, strict=True)
    return [*(number for source in sources for number in source), call.cos, call.sin, call.keys, call.values, call.heads]


def _number(call: Call) -> float:
    if isinstance(call, Append):
        return 0.0
    return call.eps if isinstance(call, Product) else call.scale


def decode(program: Sequence[int], numbers: Sequence[float], activations: Sequence[str]) -> list[Step]:
    """The inverse of :func:`encode`."""
    read = iter(program)
    return [_step(read, number, activation) for number, activation in zip(numbers, activations, strict=True)]


def _step(read: Iterator[int], number: float, activation: str) -> Step:
    kind, returned = KINDS[next(read)], bool(next(read))
    if kind is Attention:
        query, key, value, mask = (next(read) for _ in range(4))
        return Step(Attention(query, key, value, mask, number), returned)
    if kind is Append:
        query, q, key, k, value, v, *rest = (next(read) for _ in range(11))
        return Step(Append(query, key, value, (q, k, v), *rest), returned)
    x, activation_bits, norm_weight, residual, gated, dtype, count = (next(read) for _ in range(7))
    operands = [(next(read), next(read), next(read)) for _ in range(count)]
    weights, biases, rows = zip(*operands, strict=True)
    rounded = None if dtype == NONE else DTYPES[dtype]
    product = Product(x, norm_weight, number, weights, biases, rows, activation, bool(gated), residual, activation_bits, rounded)
    return Step(product, returned)


@dataclass(frozen=True)
class Operators:
    """What computes the steps of a chain: the operators of their names, or what stands for them."""

    product: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    append: Callable[..., Tensor]


def run(inputs: Sequence[Tensor], steps: Sequence[Step], operators: Operators, starts: Sequence[int] = ()) -> list[Tensor]:
    """The results of a chain by its definition. ``inputs`` are followed by the caches, which are written to."""
    values, returned, left = list(inputs), [], iter(starts)
    for step in steps:
        results = _results(values, step.call, operators, left)
        values += results
        if step.returned:
            returned += results
    return returned


def _results(values: Sequence[Tensor], call: Call, operators: Operators, starts: Iterator[int]) -> list[Tensor]:
    def at(position: Position) -> Tensor | None:
        return None if position == NONE else values[position]

    if isinstance(call, Product):
        return [
            operators.product(
                at(call.x), at(call.norm_weight), call.eps, [at(i) for i in call.weights], [at(i) for i in call.biases],
                list(call.rows), call.activation, call.gated, at(call.residual), call.activation_bits, call.dtype,
            )
        ]  # fmt: skip
    if isinstance(call, Attention):
        result = operators.attention(at(call.query), at(call.key), at(call.value), at(call.mask), call.scale)
        return [result.transpose(1, 2).flatten(2)]
    start, keys, values_ = next(starts), values[call.keys], values[call.values]
    query = operators.append(
        at(call.query),
        at(call.key),
        at(call.value),
        at(call.cos),
        at(call.sin),
        keys,
        values_,
        start,
        list(call.columns),
        call.heads,
    )
    end = start + query.shape[2]
    return [query, keys[:, :, :end], values_[:, :, :end]]


def append(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor, start: int,
    columns: Sequence[int], heads: int,
) -> Tensor:  # fmt: skip
    """``kbit::append_cpu`` by its definition, in the dtype of its operands.

    Puts the keys and values of ``M`` new tokens into caches ``[B, H', L, D]`` from ``start`` on, and returns the queries
    ``[B, heads, M, D]``. Queries and keys are turned by their positions (rotary embedding) where angles are given.

    Args:
        query, key, value: ``[B, M, columns]``, whose heads lie side by side from the column of ``columns`` on that is theirs.
        cos, sin: ``[B or 1, M, D]``.
    """

    def split(x: Tensor, column: int, heads: int, size: int) -> Tensor:
        rows: Tensor = x.narrow(-1, column, heads * size).unflatten(-1, (heads, size))
        return rows.transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        if cos is None or sin is None:
            return x
        first, second = x.chunk(2, -1)
        crossed = torch.cat([-second, first], -1)
        return x * cos[:, None] + crossed * sin[:, None]

    key_heads, size = keys.shape[1], keys.shape[3]
    place = slice(start, start + query.shape[1])
    keys[:, :, place] = turned(split(key, columns[1], key_heads, size))
    values[:, :, place] = split(value, columns[2], key_heads, values.shape[3])
    return turned(split(query, columns[0], heads, size))
