"""Whether a kernel computes what its family is defined to compute."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.config import LayerConfig
from kbit_inductor.kernels.layout import TILED_LAYOUTS
from kbit_inductor.lowering import ops
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import Kernel
from kbit_inductor.packing import PackedWeight, pack, plane_operands
from kbit_inductor.testing.bounds import Grid, product, rounded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One product or look-up.

    Attributes:
        family: ``"linear"`` or ``"embedding"``.
        size: M, N and K: rows of activations or look-ups, rows and columns of the weight.
        config: how the weight is stored.
        dtype: of the activations or of what is looked up.
        bias: whether there is one.
        strided: whether ``x`` has strides of its own.
        seed: of all values.
    """

    family: str
    size: tuple[int, int, int]
    config: LayerConfig
    dtype: torch.dtype
    bias: bool
    strided: bool
    seed: int

    def problem(self, device: str) -> Problem:
        """As the registry asks for it."""
        _, rows, columns = self.size
        config, bits = self.config, self.config.activation_bits
        return Problem(
            self.family, device, self.dtype, rows, columns, config.bits, config.group_columns(columns), config.levels() is None,
            16 if isinstance(bits, str) else bits,
        )  # fmt: skip


def check_kernel(kernel: Kernel, cases: int = 200, device: str = "cpu", seed: int = 0) -> int:
    """Compare ``kernel`` with its definition in float64, from small cases to larger ones.

    Every number of bits, groups that do not divide a row, every dtype, with and without bias, offset and codebook, empty inputs and
    strides. What ``supports`` refuses is left out.

    Args:
        kernel: what :func:`kbit_inductor.register_kernel` returned, or a record that is not registered.
        cases: how many are drawn.
        device: where it runs.
        seed: of the cases.

    Returns:
        How many cases it supports.

    Raises:
        AssertionError: a result of another shape, dtype or value than the bound allows, or a kernel that supports no case. The
            message has the case; ``check_case(kernel, case)`` runs it again.
    """
    supported = [case for case in draw(cases, seed) if kernel.supports(case.problem(device)) is None]
    if not supported:
        raise AssertionError(f"kernel {kernel.name!r} supports none of {cases} cases on {device!r}: nothing was checked")
    for case in supported:
        check_case(kernel, case, device)
    return len(supported)


def draw(count: int, seed: int) -> Iterator[Case]:
    """Cases, which grow."""
    choose = random.Random(seed)
    for i in range(count):
        largest = 4 + 64 * i // count
        bits = choose.randint(1, 8)
        config = LayerConfig(
            bits, choose.choice([1, 3, 8, 16, 32, 64, -1]), choose.random() < 0.3, "rtn", choose.choice([16, 16, 8, 4, 2]),
            choose.choice(["uniform", "uniform", "normal"]),
        )  # fmt: skip
        size = (choose.randint(0, 6), choose.randint(1, largest), choose.randint(1, 2 * largest))
        family = choose.choice(["linear", "linear", "linear", "embedding"])
        yield Case(family, size, config, choose.choice(DTYPES), choose.random() < 0.5, choose.random() < 0.3, seed + i)


def check_case(kernel: Kernel, case: Case, device: str = "cpu") -> None:
    """Compare ``kernel`` with its definition on one case.

    Raises:
        AssertionError: they differ by more than the bound.
    """
    overload = ops.overload(case.family, kernel.suffix)
    with torch.no_grad():
        overload(*_problem(kernel, dataclasses.replace(case, seed=case.seed + 1), device)[0])  # a kernel must not remember this
        arguments, exact, bound = _problem(kernel, case, device)
        actual = overload(*arguments)
    _compare(kernel, case, actual, exact, bound)
    _compare_fake(kernel, case, arguments, actual)


def _problem(kernel: Kernel, case: Case, device: str) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """The arguments of the operator, what it is to give in float64, and the bound of each element."""
    generator = torch.Generator().manual_seed(case.seed)
    m, n, k = case.size
    packed = pack(torch.randn(n, k, generator=generator).to(device), case.config, layout=kernel.layout)
    if case.family == "embedding":
        indices = torch.randint(0, n, (m, 2), generator=generator).to(device)
        exact = packed.dequantize(torch.float64)[indices]
        bound = rounded(exact, 4 * 2.0**-24 * Grid.of(packed).magnitude[indices], case.dtype)
        return _embedding_arguments(kernel, case, packed, indices), exact, bound
    x, bias = _operands(case, generator, device)
    arguments = _linear_arguments(kernel, case, packed, x, bias)
    return arguments, *product(x, Grid.of(packed), bias, arguments[-1] if kernel.layout in TILED_LAYOUTS else None)


def _operands(case: Case, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor | None]:
    m, n, k = case.size
    x = torch.randn(2, m, 2 * k if case.strided else k, generator=generator).to(case.dtype).to(device)
    bias = torch.randn(n, generator=generator).to(case.dtype).to(device) if case.bias else None
    return x[..., ::2] if case.strided else x, bias


def _linear_arguments(kernel: Kernel, case: Case, packed: PackedWeight, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    if kernel.layout in TILED_LAYOUTS:
        return x, packed.operands[0], bias, case.size[1], case.problem("cpu").activation_bits
    *operands, codebook = plane_operands(packed.operands, case.config)
    last = () if codebook is None else (codebook,)  # a kernel of uniform codes need not take one
    return (x, *operands, bias, case.config.group_columns(case.size[2]), *last)


def _embedding_arguments(kernel: Kernel, case: Case, packed: PackedWeight, indices: Tensor) -> tuple[Any, ...]:
    columns = case.size[2]
    if kernel.layout in TILED_LAYOUTS:
        return indices, packed.operands[0], columns, case.dtype
    *operands, codebook = plane_operands(packed.operands, case.config)
    return indices, *operands, columns, case.config.group_columns(columns), case.dtype, *(() if codebook is None else (codebook,))


def _compare(kernel: Kernel, case: Case, actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    again = f"; again: check_case(kernel, {case})"
    if actual.shape != exact.shape or actual.dtype != case.dtype:
        given = f"{actual.dtype} {list(actual.shape)}, not {case.dtype} {list(exact.shape)}"
        raise AssertionError(f"kernel {kernel.name!r} gives {given}{again}")
    excess = (actual.double() - exact).abs() / bound
    if not bool((excess <= 1).all()):  # NaN is not below
        worst = float(excess.nan_to_num(float("inf")).max())
        raise AssertionError(f"kernel {kernel.name!r} is {worst:.3g} times the bound of rounding away from its definition{again}")


def _compare_fake(kernel: Kernel, case: Case, arguments: tuple[Any, ...], actual: Tensor) -> None:
    on_meta = [value.to("meta") if isinstance(value, Tensor) else value for value in arguments]
    fake = ops.overload(case.family, kernel.suffix)(*on_meta)
    if fake.shape != actual.shape or fake.dtype != actual.dtype:
        raise AssertionError(
            f"kernel {kernel.name!r} gives {actual.dtype} {list(actual.shape)}, its fake {fake.dtype} {list(fake.shape)}; {case}"
        )
