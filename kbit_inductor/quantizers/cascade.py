"""Nested codes: the first k bits of every code are its code of k bits, so one stored weight is a model at every precision.

The full-range grid of a group, widened a little at either end, cuts it into cells of even width, and the cells of k bits are those
of more bits put together. What k bits stand for is no cell's middle but an even grid of their own, fitted to the group by least
squares at every k. Of the widened grids the one is kept whose errors at all k, each relative to that of the full range, are least
together.

Nested codes of one model: Park et al., "Any-Precision LLM" (2024), who split the clusters of the least bits; Nair et al.,
"Matryoshka Quantization" (2025), who train them. The fit of scale and offset at every k is that of :mod:`.clip`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import group_count
from kbit_inductor.quantizers.clip import fit
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.grid import CHUNK_ELEMENTS, GroupValues, decode, global_scale_of, ratio
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.quantizers.statistics import Statistics

WIDENINGS = (0.02, 0.04, 0.06, 0.08, 0.11)  # of an end, in ranges of the group
# Even cells lose most at two bits, where a search would cut off the most, so they count for more.
WEIGHT_OF_TWO_BITS = 8.0


@dataclass(frozen=True)
class Nested:
    """A weight ``[N, K]`` as codes of ``bits``, with a grid for each number of their leading bits.

    Attributes:
        codes: uint8 ``[N, K]``.
        scale: float16 ``[bits, N, G]``; row ``k - 1`` is that of the first ``k`` bits.
        offset: float16 ``[bits, N, G]``.
        global_scale: float32 ``[1]``, a power of two.
        errors: at 1 to ``bits`` bits, squared error over squared norm of the weight (0 for an empty or zero weight).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    global_scale: Tensor
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Grids:
    """Codes, uint8 ``[R, g]``, of groups; and for each number of leading bits scale, offset, and squared error, plain and weighted
    by importance, all ``[bits, R]``."""

    codes: Tensor
    scale: Tensor
    offset: Tensor
    plain: Tensor
    error: Tensor

    def score(self, unit: Tensor) -> Tensor:
        """All errors together, ``[R]``, each in ``unit`` ``[bits, R]``: one that was 0 may not grow."""
        ratios = self.error / unit.clamp(min=torch.finfo(unit.dtype).tiny)
        if len(ratios) > 1:
            ratios[1] *= WEIGHT_OF_TWO_BITS
        return ratios.sum(dim=0)

    def where(self, wins: Tensor, other: Grids) -> Grids:
        """``other`` for the groups of ``wins`` ``[R]``."""
        merged = {
            field.name: torch.where(
                wins.unsqueeze(-1) if field.name == "codes" else wins, getattr(other, field.name), getattr(self, field.name)
            )
            for field in dataclasses.fields(self)
        }
        return Grids(**merged)


def cascade(weight: Tensor, format: Format, statistics: Statistics | None = None) -> Nested:
    """Quantize ``weight`` ``[N, K]`` with nested codes of ``format.bits``, errors weighted by ``statistics.mean_square`` if given.

    ``format`` has offsets and no codebook: cells that are put together have their middle where no symmetric grid has a level.
    """
    rows, columns = weight.shape
    size, bits = format.group_size, format.bits
    global_scale = global_scale_of(weight)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(bits, rows, group_count(columns, size), dtype=torch.float16, device=weight.device)
    offset = torch.empty_like(scale)
    importance = None if statistics is None else statistics.importance().to(weight.device)
    errors, norm = torch.zeros(bits, dtype=torch.float64), 0.0
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    whole = columns // size * size
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values = weight[part].float() / global_scale
        norm += float(values.square().sum(dtype=torch.float64))
        # The last group of a row may be shorter; it gets a grid for what it has.
        for first, end, width in ((0, whole, size), (whole, columns, columns - whole)):
            if first == end:
                continue
            among = None if importance is None else importance.expand_as(values)[:, first:end].reshape(-1, width)
            found = _search(GroupValues(values[:, first:end].reshape(-1, width), among), bits)
            grids = slice(first // size, -(-end // size))
            codes[part, first:end] = found.codes.view(len(values), -1)
            scale[:, part, grids] = found.scale.view(bits, len(values), -1).half()
            offset[:, part, grids] = found.offset.view(bits, len(values), -1).half()
            errors += found.plain.sum(dim=1, dtype=torch.float64).cpu()
    return Nested(codes, scale, offset, global_scale, tuple(ratio(error, norm) for error in errors.tolist()))


def _search(groups: GroupValues, bits: int) -> Grids:
    """Either end of the range widened in turn, as long as that is better."""
    low, high = groups.values.amin(-1), groups.values.amax(-1)
    span = high - low
    best = full = _nested(groups, low, high, bits)
    score = full.score(full.error)
    for end in (0, 1):
        kept = low, high
        for widening in WIDENINGS:
            moved = (kept[0] - widening * span, kept[1]) if end == 0 else (kept[0], kept[1] + widening * span)
            tried = _nested(groups, *moved, bits)
            reached = tried.score(full.error)
            wins = reached < score
            score = torch.where(wins, reached, score)
            low, high = torch.where(wins, moved[0], low), torch.where(wins, moved[1], high)
            best = best.where(wins, tried)
    return best


def _nested(groups: GroupValues, low: Tensor, high: Tensor, bits: int) -> Grids:
    """Nearest codes on the even grids from ``low`` to ``high`` ``[R]``, and the fitted grids of their leading bits."""
    span = (high - low).unsqueeze(-1)
    inverse = torch.where(span > 0, (2**bits - 1) / span, 0.0)
    codes = ((groups.values - low.unsqueeze(-1)) * inverse).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    scales, offsets, plain, errors = [], [], [], []
    for k in range(1, bits + 1):
        leading = (codes >> (bits - k)).float()
        scale, offset = fit(groups, leading, torch.zeros_like(low), False, Levels(k))
        squared = (decode(leading, scale, offset, Levels(k)) - groups.values).square_()
        scales.append(scale)
        offsets.append(offset if offset is not None else torch.zeros_like(scale))
        plain.append(squared.sum(dim=-1))
        errors.append(groups.total(squared))
    return Grids(codes, *(torch.stack(each) for each in (scales, offsets, plain, errors)))
