"""Small models, and whether what they give compiled is of the weights that they have now.

The oracle is the model in eager with its weights dequantized. That alone would not see a stale pack, whose dequantized form is
stale too, so most tests compile to 8 bits and also ask that the result be near the float model as it is now.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kbit_inductor.packing import PackedWeight
from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.weights.store import STORE

WIDTH = 64
HIDDEN = 128
EIGHT = {"bits": 8}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, WIDTH)


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model, backend="kbit", options=EIGHT)


def rounding(products: int, dtype: torch.dtype = torch.float32) -> float:
    """A bound on the relative difference of two evaluations of a chain of ``products`` dot products of HIDDEN terms at most.

    A float32 dot product of K terms is off by at most K·u·Σ|xᵢwᵢ|, u = 2⁻²⁴ (Higham, 2002, section 3.1), and for terms of random
    sign Σ|xᵢwᵢ| is √K times the sum itself; both evaluations are off that much, hence factor 2. In a narrower dtype input,
    weight and result of each product are rounded once more in each evaluation, by half of its eps relative to Σ|xᵢwᵢ|.
    """
    narrow = 0.0 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps / 2
    return 2 * products * HIDDEN**0.5 * (HIDDEN * 2.0**-24 + narrow)


def quantized(products: int) -> float:
    """A bound on what 8 bits change: weights of Linear's uniform initialization on (−a, a) are rounded by a/255, and a/√3 is
    their root mean square, so 0.7 % per product; embeddings are normal, and a group of 64 of those spans 2.5 times as much.
    """
    return 0.02 * products


def assert_current(y: Tensor, model: nn.Module, *args: Tensor, products: int = 2) -> None:
    """``y`` is what ``model`` gives now, with packed weights."""
    assert relative_error(y, dequantized_copy(model)(*args)) <= rounding(products)
    floats = model(*args)
    assert 0 < relative_error(y, floats) <= quantized(products)


def assert_changed(y: Tensor, old: Tensor) -> None:
    """The weights were changed by so much that a stale result could not be taken for the new one."""
    assert relative_error(y, old) > 0.1


def packed(weight: Tensor) -> PackedWeight:
    """The one packed form of ``weight``."""
    ((_, form),) = STORE.packed_forms(weight)
    return form


def multiply(model: Block) -> None:
    model.down.weight.mul_(-3)


def replace_parameter(model: Block) -> None:
    model.down.weight = nn.Parameter(torch.randn(WIDTH, HIDDEN))


class Square(nn.Module):
    """One module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.proj(x)))
