"""Half-quadratic quantization: the grid with the least p-norm error, p < 1, so that a few large values may be far off.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). Their error norm is split in two: a copy of
the error, shrunk towards zero by the generalized soft threshold, and the grid that fits what is left by least squares; in turn.
Here the threshold is relative to the step of each group, so that the result does not depend on the unit of the weight, the scale is
fitted with the offset, and of all iterates of a group the best is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.quantizers.clip import find_grids as clip_grids
from kbit_inductor.quantizers.clip import fit
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.grid import Grids, GroupValues, Quantized, decode, encode, quantize_groups
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.quantizers.statistics import Statistics

NORM = 0.75  # p; theirs is 0.7, which takes logarithms where this one takes square roots
SHARPNESS, GROWTH, ITERATIONS = 10.0, 1.01, 20  # β of the first iteration, its factor from one to the next, and how many


def hqq(weight: Tensor, format: Format, statistics: Statistics | None = None) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` by half-quadratic optimization; ``statistics`` change nothing."""
    return quantize_groups(weight, format, find_grids)


def find_grids(groups: GroupValues, levels: Levels, symmetric: bool) -> Grids:
    """The best of the iterates for each group, the first of which is that of a clip search."""
    scale, offset = clip_grids(groups, levels, symmetric)
    best = (_norm(groups.values, scale, offset, levels), scale, offset)
    for iteration in range(ITERATIONS):
        nearest = encode(groups.values, scale, offset, levels)
        step = scale.abs().unsqueeze(-1)
        error = (groups.values - decode(nearest, scale, offset, levels)) / torch.where(step > 0, step, 1)
        slack = _shrink(error, SHARPNESS * GROWTH**iteration) * step
        scale, offset = fit(GroupValues(groups.values - slack), nearest, scale, symmetric, levels)
        norm = _norm(groups.values, scale, offset, levels)
        wins = norm < best[0]
        merged = None if offset is None or best[2] is None else torch.where(wins, offset, best[2])
        best = torch.where(wins, norm, best[0]), torch.where(wins, scale, best[1]), merged
    return best[1], best[2]


def _shrink(error: Tensor, sharpness: float) -> Tensor:
    """The generalized soft threshold of the p-norm: ``sign(e) * max(0, |e| - |e| ** (p - 1) / sharpness)``."""
    magnitude = error.abs()
    return error.sign() * (magnitude - magnitude.sqrt().rsqrt_() / sharpness).clamp_(min=0)


def _norm(values: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels) -> Tensor:
    """The sum of ``|error| ** p`` ``[R]`` of each group on its grid."""
    root = (decode(encode(values, scale, offset, levels), scale, offset, levels) - values).abs_().sqrt_()
    return (root * root.sqrt()).sum(dim=-1)
