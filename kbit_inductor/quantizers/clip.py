"""Round to nearest on a grid that may cut off a group's extremes where that lowers the squared error.

The search over shrunken ranges is the data-free form of the clipping searches of OMSE (Choukroun et al., 2019) and AWQ (Lin et
al., 2023). The winner is refined by one least-squares fit of scale and offset to its own codes (Lloyd's second step).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.quantizers.codebooks import Codebook
from kbit_inductor.quantizers.grid import Method, Quantized, decode, encode, quantize_groups, round_to_half
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.quantizers.rtn import full_range

CANDIDATES = 24
# The range worth trying shrinks with the bits: at 8 bits a Gaussian group loses from any cut below a few percent.
LOWEST_SHRINK = {1: 0.2, 2: 0.4, 3: 0.55, 4: 0.65, 5: 0.75, 6: 0.85, 7: 0.9, 8: 0.92}
# Of codebooks: a group of few does not hold the values that their outer levels are made for, so a wider range may be better.
CODEBOOK_SHRINK = {2: (0.4, 1.0), 3: (0.5, 1.1), 4: (0.6, 1.45), 5: (0.7, 1.7), 6: (0.8, 1.8), 7: (0.85, 1.8)}


def clip(weight: Tensor, bits: int, group_size: int, symmetric: bool, codebook: Codebook | None = None) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` with a clip search per group."""
    levels = Levels(bits, codebook)
    return quantize_groups(weight, levels, group_size, symmetric, Method(search, CANDIDATES, *shrink_range(levels)))


def shrink_range(levels: Levels) -> tuple[float, float]:
    """Widths of the narrowest and the widest grid worth trying, relative to the full range."""
    return CODEBOOK_SHRINK[levels.bits] if levels.codebook else (LOWEST_SHRINK[levels.bits], 1.0)


def search(groups: Tensor, levels: Levels, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The best grid found for each of ``groups`` ``[R, g]``. The full range is tried first, and kept where nothing beats it,
    so a weight that the full-range grid holds exactly stays exact."""
    scale, offset = full_range(groups, levels, symmetric)
    best = (squared_error(groups, scale, offset, levels), scale, offset)
    lowest, highest = shrink_range(levels)
    for step in range(1, CANDIDATES):
        shrink = highest - (highest - lowest) * step / (CANDIDATES - 1)
        best = _better(groups, best, _shrunk(scale, offset, shrink, levels), levels)
    best = _better(groups, best, least_squares(groups, best[1], best[2], levels), levels)
    return best[1], best[2]


def squared_error(groups: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels) -> Tensor:
    """The squared error ``[R]`` of each group on its grid."""
    return (decode(encode(groups, scale, offset, levels), scale, offset, levels) - groups).square_().sum(dim=-1)


def least_squares(groups: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels) -> tuple[Tensor, Tensor | None]:
    """The scale and offset that fit ``groups`` best with the levels of the given grid held fixed."""
    nearest = encode(groups, scale, offset, levels)
    if offset is None:
        nearest = nearest - levels.midpoint
        spread = nearest.square().sum(dim=-1)
        return round_to_half(torch.where(spread > 0, (nearest * groups).sum(dim=-1) / spread, scale)), None
    centre, mean = nearest.mean(dim=-1, keepdim=True), groups.mean(dim=-1, keepdim=True)
    spread = (nearest - centre).square().sum(dim=-1)
    slope = ((nearest - centre) * (groups - mean)).sum(dim=-1) / spread
    fitted = round_to_half(torch.where(spread > 0, slope, scale))
    return fitted, round_to_half(mean.squeeze(-1) - fitted * centre.squeeze(-1))


def _shrunk(scale: Tensor, offset: Tensor | None, shrink: float, levels: Levels) -> tuple[Tensor, Tensor | None]:
    """The grid narrowed to ``shrink`` of its width about its own middle."""
    if offset is None:
        return round_to_half(scale * shrink), None
    return round_to_half(scale * shrink), round_to_half(offset + scale * ((1 - shrink) * (levels.lowest + levels.highest) / 2))


Scored = tuple[Tensor, Tensor, "Tensor | None"]


def _better(groups: Tensor, best: Scored, candidate: tuple[Tensor, Tensor | None], levels: Levels) -> Scored:
    """Group by group, the grid with the smaller squared error."""
    error, scale, offset = best
    new_scale, new_offset = candidate
    new_error = squared_error(groups, new_scale, new_offset, levels)
    wins = new_error < error
    merged = None if offset is None or new_offset is None else torch.where(wins, new_offset, offset)
    return torch.where(wins, new_error, error), torch.where(wins, new_scale, scale), merged
