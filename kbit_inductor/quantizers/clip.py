"""Round to nearest on a grid that may cut off a group's extremes where that lowers the squared error.

The search over shrunken ranges is that of OMSE (Choukroun et al., 2019) and AWQ (Lin et al., 2023); with statistics, the error of
each column is weighted by its E[x²], as llama.cpp's importance matrix does. The winner is refined by least-squares fits of scale
and offset to its own codes, which then are chosen anew (Lloyd's two steps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.grid import Grids, GroupValues, Quantized, Search, decode, encode, quantize_groups, round_to_half
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.quantizers.rtn import full_range
from kbit_inductor.quantizers.statistics import Statistics

CANDIDATES = 24
REFITS = 8
# The range worth trying shrinks with the bits: at 8 bits a Gaussian group loses from any cut below a few percent.
LOWEST_SHRINK = {1: 0.2, 2: 0.4, 3: 0.55, 4: 0.65, 5: 0.75, 6: 0.85, 7: 0.9, 8: 0.92}
# Of codebooks: a group of few does not hold the values that their outer levels are made for, so a wider range may be better.
CODEBOOK_SHRINK = {2: (0.4, 1.0), 3: (0.5, 1.1), 4: (0.6, 1.45), 5: (0.7, 1.7), 6: (0.8, 1.8), 7: (0.85, 1.8)}


def clip(weight: Tensor, format: Format, statistics: Statistics | None = None) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` with a clip search per group, its error weighted by ``statistics.mean_square`` if given."""
    importance = None if statistics is None else statistics.importance().to(weight.device)
    return quantize_groups(weight, format, find_grids, search(format.levels), importance)


def search(levels: Levels) -> Search:
    """:func:`find_grids` for the compiled form."""
    return Search(CANDIDATES, *shrink_range(levels), REFITS)


def shrink_range(levels: Levels) -> tuple[float, float]:
    """Widths of the narrowest and the widest grid worth trying, relative to the full range."""
    return CODEBOOK_SHRINK[levels.bits] if levels.codebook else (LOWEST_SHRINK[levels.bits], 1.0)


def find_grids(groups: GroupValues, levels: Levels, symmetric: bool) -> Grids:
    """The best grid found for each group. The full range is tried first, and kept where nothing beats it, so a weight that the
    full-range grid holds exactly stays exact."""
    scale, offset = full_range(groups.values, levels, symmetric)
    best = (squared_error(groups, scale, offset, levels), scale, offset)
    lowest, highest = shrink_range(levels)
    for step in range(1, CANDIDATES):
        shrink = highest - (highest - lowest) * step / (CANDIDATES - 1)
        best = _better(groups, best, _shrunk(scale, offset, shrink, levels), levels)
    for _ in range(REFITS):
        best = _better(groups, best, least_squares(groups, best[1], best[2], levels), levels)
    return best[1], best[2]


def squared_error(groups: GroupValues, scale: Tensor, offset: Tensor | None, levels: Levels) -> Tensor:
    """The squared error ``[R]`` of each group on its grid, weighted by importance."""
    nearest = encode(groups.values, scale, offset, levels)
    return groups.total((decode(nearest, scale, offset, levels) - groups.values).square_())


def least_squares(groups: GroupValues, scale: Tensor, offset: Tensor | None, levels: Levels) -> Grids:
    """The scale and offset that fit the groups best with the levels of the given grid held fixed."""
    return fit(groups, encode(groups.values, scale, offset, levels), scale, offset is None, levels)


def fit(groups: GroupValues, nearest: Tensor, scale: Tensor, symmetric: bool, levels: Levels) -> Grids:
    """The scale and offset with which the levels ``nearest`` ``[R, g]`` fit the groups best; ``scale`` where all levels are one."""
    if symmetric:
        nearest = nearest - levels.midpoint
        spread = groups.total(nearest.square())
        return round_to_half(torch.where(spread > 0, groups.total(nearest * groups.values) / spread, scale)), None
    count = groups.total(torch.ones_like(nearest))
    centre, mean = groups.total(nearest) / count, groups.total(groups.values) / count
    deviation = nearest - centre.unsqueeze(-1)
    spread = groups.total(deviation.square())
    slope = groups.total(deviation * (groups.values - mean.unsqueeze(-1))) / spread
    fitted = round_to_half(torch.where(spread > 0, slope, scale))
    return fitted, round_to_half(mean - fitted * centre)


def _shrunk(scale: Tensor, offset: Tensor | None, shrink: float, levels: Levels) -> Grids:
    """The grid narrowed to ``shrink`` of its width about its own middle."""
    if offset is None:
        return round_to_half(scale * shrink), None
    return round_to_half(scale * shrink), round_to_half(offset + scale * ((1 - shrink) * (levels.lowest + levels.highest) / 2))


Scored = tuple[Tensor, Tensor, "Tensor | None"]


def _better(groups: GroupValues, best: Scored, candidate: Grids, levels: Levels) -> Scored:
    """Group by group, the grid with the smaller squared error."""
    error, scale, offset = best
    new_scale, new_offset = candidate
    new_error = squared_error(groups, new_scale, new_offset, levels)
    wins = new_error < error
    merged = None if offset is None or new_offset is None else torch.where(wins, new_offset, offset)
    return torch.where(wins, new_error, error), torch.where(wins, new_scale, scale), merged
