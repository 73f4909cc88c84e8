"""Round to nearest on the grid that spans each group's minimum and maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.grid import Grids, GroupValues, Quantized, Search, quantize_groups, round_to_half
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.quantizers.statistics import Statistics


def rtn(weight: Tensor, format: Format, statistics: Statistics | None = None) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` by rounding to nearest; ``statistics`` change nothing."""
    return quantize_groups(weight, format, find_full_range, Search())


def find_full_range(groups: GroupValues, levels: Levels, symmetric: bool) -> Grids:
    """:func:`full_range` of the values alone."""
    return full_range(groups.values, levels, symmetric)


def full_range(groups: Tensor, levels: Levels, symmetric: bool) -> Grids:
    """The grid of each of ``groups`` ``[R, g]`` whose ends are the group's own.

    A symmetric grid puts the value of largest magnitude on its lowest level, with a negative scale when that value is
    positive, so that all ``2 ** bits`` levels are used (as llama.cpp's Q4_0 does).
    """
    if not symmetric:
        low, high = groups.aminmax(dim=-1)
        scale = round_to_half((high - low) / (levels.highest - levels.lowest))
        return scale, round_to_half(low - scale * levels.lowest)
    return round_to_half(extreme(groups) / (levels.lowest - levels.midpoint)), None


def extreme(groups: Tensor) -> Tensor:
    """The signed value of largest magnitude of each group, ``[R]``."""
    low, high = groups.aminmax(dim=-1)
    return torch.where(-low > high, low, high)
