"""Round to nearest on the grid that spans each group's minimum and maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.quantizers.grid import Method, Quantized, quantize_groups, round_to_half


def rtn(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` by rounding to nearest."""
    return quantize_groups(weight, bits, group_size, symmetric, Method(full_range))


def full_range(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The grid of each of ``groups`` ``[R, g]`` whose ends are the group's own.

    A symmetric grid puts the value of largest magnitude on its lowest code, with a negative scale when that value is
    positive, so that all ``2 ** bits`` levels are used (as llama.cpp's Q4_0 does).
    """
    if not symmetric:
        low, high = groups.aminmax(dim=-1)
        return round_to_half((high - low) / (2**bits - 1)), round_to_half(low)
    return round_to_half(-extreme(groups) / (0.5 if bits == 1 else 2 ** (bits - 1))), None


def extreme(groups: Tensor) -> Tensor:
    """The signed value of largest magnitude of each group, ``[R]``."""
    low, high = groups.aminmax(dim=-1)
    return torch.where(-low > high, low, high)
