"""What takes part in a comparison of layers: a way to compute ``y = x Wᵀ`` from a weight in a form of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpu.timing import Call


@dataclass(frozen=True)
class Copy:
    """One copy of a weight ``[N, K]`` in a contender's own form, in memory that no other copy shares.

    Attributes:
        nbytes: bytes that a product reads of it.
        bind: from activations ``x [M, K]`` in float32 to a call that computes ``y [M, N]``, a tensor or an array.
    """

    nbytes: int
    bind: Callable[[Tensor], Call]


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer.

    Attributes:
        name: as the tables show it.
        bits: of a weight's code, without scales.
        load: prepares a float32 weight ``[N, K]`` once; what it returns makes a copy at each call. It raises where the library is
            not installed or has no such layer, and the message is the reason that the tables show.
        family: contenders of one family are ours, or one peer's.
    """

    name: str
    bits: int
    load: Callable[[Tensor], Callable[[], Copy]]
    family: str

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.family.startswith("kbit")


def relative_error(copy: Copy, weight: Tensor, x: Tensor) -> float:
    """Norm of the error of ``y`` over the norm of ``x Wᵀ`` in float64."""
    expected = x.double() @ weight.double().t()
    call = copy.bind(x)  # its memory may be the result's
    error = as_tensor(call()).double() - expected
    return float(error.norm() / expected.norm())


def as_tensor(y: Any) -> Tensor:
    """A tensor of what a call returned."""
    return y if isinstance(y, Tensor) else torch.as_tensor(y)
