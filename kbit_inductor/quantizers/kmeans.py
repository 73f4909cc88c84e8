"""Levels that are learned for one weight: weighted k-means of its values, each group on the grid that suits it.

Kim et al., "SqueezeLLM" (2023), weigh values by how much they count, as here by E[x²] of their column, and learn a codebook for
each row; here one is for a whole weight, and scale and offset of each group fit it to the group. Lloyd (1982): in turn, each value
goes to its nearest level, and each level to the mean of its values.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import takes_codebook
from kbit_inductor.quantizers.clip import clip
from kbit_inductor.quantizers.codebooks import ZERO, Codebook, codebook, to_bytes
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.grid import Quantized
from kbit_inductor.quantizers.statistics import Statistics

ROUNDS = 4  # of grids and levels in turn
STEPS = 20  # of Lloyd's algorithm in each
FINENESS = 8  # bins to a level: positions are counted, not kept


def learn_levels(weight: Tensor, format: Format, statistics: Statistics | None = None) -> Codebook | None:
    """The levels with the least error found for ``weight`` ``[N, K]`` in ``format``, whose own are not looked at.

    Those of ``"normal"`` where nothing beats them; None at 1 and 8 bits, where every code is its own level.
    """
    if not takes_codebook(format.bits):
        return None
    tried: Codebook = codebook("normal", format.bits) or ()
    best, least = tried, float("inf")
    for _ in range(ROUNDS if weight.numel() else 0):
        form = dataclasses.replace(format, codebook=tried)
        found = clip(weight, form, statistics)
        counts, means, lost = _histogram(weight.float(), found, form, statistics)
        if lost >= least:
            break
        best, least = tried, lost
        tried = to_bytes(_kmeans(counts, means, torch.tensor(tried, dtype=torch.float64)) - ZERO)
    return best


def _histogram(weight: Tensor, found: Quantized, form: Format, statistics: Statistics | None) -> tuple[Tensor, Tensor, float]:
    """How much each bin of positions between the levels counts and the mean position in it, float64, and the error."""
    columns = weight.size(1)
    group = torch.arange(columns, device=weight.device) // form.group_size
    scale = found.scale.float()[:, group]
    base = -scale * ZERO if found.offset is None else found.offset.float()[:, group]
    values = weight / found.global_scale
    positions = torch.where(scale == 0, float(ZERO), (values - base) / torch.where(scale == 0, 1.0, scale)).double()
    counted = scale.double().square()
    if statistics is not None:
        counted = counted * statistics.importance().to(counted)
    levels = torch.tensor(form.codebook, dtype=torch.float64, device=weight.device)
    lost = float((counted * (positions - levels[found.codes.int()]).square()).sum())
    bins = (positions * FINENESS).round().clamp(0, 256 * FINENESS - 1).long().flatten()
    counts = torch.zeros(256 * FINENESS, dtype=torch.float64, device=weight.device).index_add_(0, bins, counted.flatten())
    sums = torch.zeros_like(counts).index_add_(0, bins, (counted * positions).flatten())
    return counts.cpu(), (sums / counts.clamp(min=torch.finfo(torch.float64).tiny)).cpu(), lost


def _kmeans(counts: Tensor, means: Tensor, levels: Tensor) -> Tensor:
    """``levels``, ascending, moved to the weighted means of the bins that are nearest; one without any stays."""
    at = torch.arange(len(counts), dtype=torch.float64) / FINENESS
    for _ in range(STEPS):
        nearest = torch.bucketize(at, (levels[1:] + levels[:-1]) / 2)
        total = torch.zeros_like(levels).index_add_(0, nearest, counts)
        sums = torch.zeros_like(levels).index_add_(0, nearest, counts * means)
        levels = torch.where(total > 0, sums / total.clamp(min=torch.finfo(torch.float64).tiny), levels).sort().values
    return levels
