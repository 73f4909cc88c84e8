"""What ``kbit::chain_cpu`` computes: products and attention one after the other, in one call.

An operator takes lists of numbers and not of steps, so steps are written as numbers. A step names its tensors by their position:
first come the inputs of the chain, then the results of its steps, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Attention:
    """A call of ``kbit::decode_attention_cpu`` whose result is laid out as ``[B, M, H * D]``."""

    query: Position
    key: Position
    value: Position
    mask: Position
    scale: float


@dataclass(frozen=True)
class Step:
    """A call in a chain.

    Attributes:
        call: what is computed.
        returned: whether the chain returns it; what only later steps read is not.
    """

    call: Product | Attention
    returned: bool


def encode(steps: Sequence[Step]) -> tuple[list[int], list[float], list[str]]:
    """``program, numbers, activations``: the arguments of the operator after ``inputs``."""
    program: list[int] = []
    for step in steps:
        call = step.call
        program += [isinstance(call, Product), step.returned]
        if isinstance(call, Product):
            operands = zip(call.weights, call.biases, call.rows, strict=True)
            program += [call.x, call.activation_bits, call.norm_weight, call.residual, call.gated, len(call.weights)]
            program += [number for operand in operands for number in operand]
        else:
            program += [call.query, call.key, call.value, call.mask]
    numbers = [step.call.eps if isinstance(step.call, Product) else step.call.scale for step in steps]
    activations = [step.call.activation if isinstance(step.call, Product) else "" for step in steps]
    return [int(number) for number in program], numbers, activations


def decode(program: Sequence[int], numbers: Sequence[float], activations: Sequence[str]) -> list[Step]:
    """The inverse of :func:`encode`."""
    read = iter(program)
    return [_step(read, number, activation) for number, activation in zip(numbers, activations, strict=True)]


def _step(read: Iterator[int], number: float, activation: str) -> Step:
    is_product, returned = next(read), bool(next(read))
    if not is_product:
        query, key, value, mask = (next(read) for _ in range(4))
        return Step(Attention(query, key, value, mask, number), returned)
    x, activation_bits, norm_weight, residual, gated, count = (next(read) for _ in range(6))
    operands = [(next(read), next(read), next(read)) for _ in range(count)]
    weights, biases, rows = zip(*operands, strict=True)
    product = Product(x, norm_weight, number, weights, biases, rows, activation, bool(gated), residual, activation_bits)
    return Step(product, returned)


def run(
    inputs: Sequence[Tensor], steps: Sequence[Step], product: Callable[..., Tensor], attention: Callable[..., Tensor]
) -> list[Tensor]:
    """The results of a chain by its definition: ``product`` and ``attention`` are the operators of the steps."""
    values, returned = list(inputs), []

    def at(position: Position) -> Tensor | None:
        return None if position == NONE else values[position]

    for step in steps:
        call = step.call
        if isinstance(call, Product):
            result = product(
                at(call.x), at(call.norm_weight), call.eps, [at(i) for i in call.weights], [at(i) for i in call.biases],
                list(call.rows), call.activation, call.gated, at(call.residual), call.activation_bits,
            )  # fmt: skip
        else:
            result = attention(at(call.query), at(call.key), at(call.value), at(call.mask), call.scale)
            result = result.transpose(1, 2).flatten(2)
        values.append(result)
        if step.returned:
            returned.append(result)
    return returned
