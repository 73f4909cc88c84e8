"""Round to nearest on a grid that may cut off a group's extremes where that lowers the squared error.

The search over shrunken ranges is the data-free form of the clipping searches of OMSE (Choukroun et al., 2019) and AWQ (Lin et
al., 2023). The winner is refined by one least-squares fit of scale and offset to its own codes (Lloyd's second step).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import midpoint
from kbit_inductor.quantizers.grid import Method, Quantized, decode, encode, quantize_groups, round_to_half
from kbit_inductor.quantizers.rtn import full_range

CANDIDATES = 24
# The range worth trying shrinks with the bits: at 8 bits a Gaussian group loses from any cut below a few percent.
LOWEST_SHRINK = {1: 0.2, 2: 0.4, 3: 0.55, 4: 0.65, 5: 0.75, 6: 0.85, 7: 0.9, 8: 0.92}


def clip(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` with a clip search per group."""
    return quantize_groups(weight, bits, group_size, symmetric, Method(search, CANDIDATES, LOWEST_SHRINK[bits]))


def search(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The best grid found for each of ``groups`` ``[R, g]``. The full range is tried first, and kept where nothing beats it,
    so a weight that the full-range grid holds exactly stays exact."""
    scale, offset = full_range(groups, bits, symmetric)
    best = (squared_error(groups, scale, offset, bits), scale, offset)
    for step in range(1, CANDIDATES):
        shrink = 1 - (1 - LOWEST_SHRINK[bits]) * step / (CANDIDATES - 1)
        best = _better(groups, best, _shrunk(scale, offset, shrink, bits), bits)
    best = _better(groups, best, least_squares(groups, best[1], best[2], bits), bits)
    return best[1], best[2]


def squared_error(groups: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> Tensor:
    """The squared error ``[R]`` of each group on its grid."""
    return (decode(encode(groups, scale, offset, bits), scale, offset, bits) - groups).square_().sum(dim=-1)


def least_squares(groups: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> tuple[Tensor, Tensor | None]:
    """The scale and offset that fit ``groups`` best with the codes of the given grid held fixed."""
    codes = encode(groups, scale, offset, bits)
    if offset is None:
        codes = codes - midpoint(bits)
        spread = codes.square().sum(dim=-1)
        return round_to_half(torch.where(spread > 0, (codes * groups).sum(dim=-1) / spread, scale)), None
    centre, mean = codes.mean(dim=-1, keepdim=True), groups.mean(dim=-1, keepdim=True)
    spread = (codes - centre).square().sum(dim=-1)
    slope = ((codes - centre) * (groups - mean)).sum(dim=-1) / spread
    fitted = round_to_half(torch.where(spread > 0, slope, scale))
    return fitted, round_to_half(mean.squeeze(-1) - fitted * centre.squeeze(-1))


def _shrunk(scale: Tensor, offset: Tensor | None, shrink: float, bits: int) -> tuple[Tensor, Tensor | None]:
    """The grid narrowed to ``shrink`` of its width about its own middle."""
    if offset is None:
        return round_to_half(scale * shrink), None
    return round_to_half(scale * shrink), round_to_half(offset + scale * ((1 - shrink) * (2**bits - 1) / 2))


Scored = tuple[Tensor, Tensor, "Tensor | None"]


def _better(groups: Tensor, best: Scored, candidate: tuple[Tensor, Tensor | None], bits: int) -> Scored:
    """Group by group, the grid with the smaller squared error."""
    error, scale, offset = best
    new_scale, new_offset = candidate
    new_error = squared_error(groups, new_scale, new_offset, bits)
    wins = new_error < error
    merged = None if offset is None or new_offset is None else torch.where(wins, new_offset, offset)
    return torch.where(wins, new_error, error), torch.where(wins, new_scale, scale), merged
