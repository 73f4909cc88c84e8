"""Groups of a weight, the affine grid of a group, and the levels that a grid gives: what every quantizer shares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import group_count
from kbit_inductor.lowering.quantize import quantize_operator
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.levels import Levels

CHUNK_ELEMENTS = 1 << 18  # elements worked on at once: 1 MB of float32, so that a search stays in the L2 cache


@dataclass(frozen=True)
class Quantized:
    """A weight ``[N, K]`` as codes.

    Attributes:
        codes: uint8 ``[N, K]``.
        scale: float16 ``[N, G]``.
        offset: float16 ``[N, G]``, or None for a symmetric grid.
        global_scale: float32 ``[1]``, a power of two.
        error: squared error over squared norm of the weight (0 for an empty or zero weight).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    global_scale: Tensor
    error: float


@dataclass(frozen=True)
class GroupValues:
    """Groups of a weight, and how much an error of each value counts.

    Attributes:
        values: float32 ``[R, g]``.
        importance: the weight of each value's squared error, float32 ``[R, g]`` and positive; None where all count alike.
    """

    values: Tensor
    importance: Tensor | None = None

    def total(self, terms: Tensor) -> Tensor:
        """The sum ``[R]`` of ``terms`` ``[R, g]``, weighted by importance."""
        return (terms if self.importance is None else terms * self.importance).sum(dim=-1)


Grids = tuple[Tensor, "Tensor | None"]
"""``(scale [R], offset [R] or None where symmetric)``, both rounded to float16, as float32."""

FindGrids = Callable[[GroupValues, Levels, bool], Grids]
"""``(groups, levels, symmetric) -> grids``: a PyTorch function that defines how the grids of groups are found."""


@dataclass(frozen=True)
class Search:
    """The same, for the compiled form.

    Attributes:
        candidates: grids tried, the full range among them, before least-squares fits; 0 for the full range as it is.
        lowest_shrink: width of the narrowest candidate, relative to the full range.
        highest_shrink: that of the widest.
        refits: how many least-squares fits.
    """

    candidates: int = 0
    lowest_shrink: float = 1.0
    highest_shrink: float = 1.0
    refits: int = 0


def quantize_groups(
    weight: Tensor,
    format: Format,
    find_grids: FindGrids,
    search: Search | None = None,
    importance: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` of any floating dtype, with one grid per group of columns.

    Args:
        weight: to be quantized.
        format: of the codes.
        find_grids: defines the grid of each group.
        search: what the compiled form is told to do the same; None where there is none.
        importance: the weight of each column's squared error, float32 ``[K]`` and positive; None where all count alike.
        global_scale: float32 ``[1]``; None for that of the weight.
    """
    if global_scale is None:
        global_scale = global_scale_of(weight)
    compiled = None if search is None else quantize_operator(weight)
    if search is None or compiled is None:
        return _quantize_in_pytorch(weight, format, find_grids, importance, global_scale)
    codes, scale, offset, errors = compiled(
        weight, float(global_scale), format.bits, format.group_size, format.symmetric, search.lowest_shrink,
        search.highest_shrink, search.candidates, format.levels.table(weight.device), importance, search.refits,
    )  # fmt: skip
    squared_error, squared_norm = errors.sum(dim=0).tolist()
    return Quantized(codes, scale, None if format.symmetric else offset, global_scale, ratio(squared_error, squared_norm))


def _quantize_in_pytorch(
    weight: Tensor, format: Format, find_grids: FindGrids, importance: Tensor | None, global_scale: Tensor
) -> Quantized:
    """A few rows at a time."""
    rows, columns = weight.shape
    size = format.group_size
    result = _empty(weight, format, global_scale)
    squared_error = squared_norm = 0.0
    whole = columns // size * size
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values = weight[part].float() / result.global_scale
        squared_norm += float(values.square().sum(dtype=torch.float64))
        weights = None if importance is None else importance.expand_as(values)
        # The last group of a row may be shorter; it gets a grid for what it has.
        for first, end, width in ((0, whole, size), (whole, columns, columns - whole)):
            if first < end:
                blocks = [None if t is None else t[:, first:end].reshape(-1, width) for t in (values, weights)]
                groups = GroupValues(*blocks)  # type: ignore[arg-type]
                grids = slice(first // size, -(-end // size))
                squared_error += _fill(result, part, slice(first, end), grids, groups, format.levels, find_grids)
    return dataclasses.replace(result, error=ratio(squared_error, squared_norm))


def ratio(squared_error: float, squared_norm: float) -> float:
    """The relative error; 0 for a weight of zeros."""
    return squared_error / squared_norm if squared_norm else 0.0


def _empty(weight: Tensor, format: Format, global_scale: Tensor) -> Quantized:
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, group_count(columns, format.group_size), dtype=torch.float16, device=weight.device)
    offset = None if format.symmetric else torch.empty_like(scale)
    return Quantized(codes, scale, offset, global_scale, 0.0)


def _fill(
    result: Quantized, rows: slice, columns: slice, grids: slice, groups: GroupValues, levels: Levels, find_grids: FindGrids
) -> float:
    """Quantize ``groups`` into a block of ``result``, and return the squared error."""
    scale, offset = find_grids(groups, levels, result.offset is None)
    nearest = encode(groups.values, scale, offset, levels)
    count = rows.stop - rows.start
    result.codes[rows, columns] = levels.codes(nearest).view(count, -1)
    result.scale[rows, grids] = scale.view(count, -1).half()
    if result.offset is not None and offset is not None:
        result.offset[rows, grids] = offset.view(count, -1).half()
    return float((groups.values - decode(nearest, scale, offset, levels)).square().sum(dtype=torch.float64))


def encode(groups: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels) -> Tensor:
    """Nearest levels, as float32 ``[R, g]``, of ``groups`` on the grids ``scale`` ``[R]`` and ``offset``; where the scale is 0, the
    level that is nearest to zero."""
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale).unsqueeze(-1)
    zero = levels.midpoint if offset is None else (-offset.unsqueeze(-1) * inverse)
    return levels.nearest(groups * inverse + zero)


def decode(nearest: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels) -> Tensor:
    """The values ``[R, g]`` of the levels ``nearest`` on the grids."""
    if offset is None:
        return (nearest - levels.midpoint) * scale.unsqueeze(-1)
    return torch.addcmul(offset.unsqueeze(-1), nearest, scale.unsqueeze(-1))


def round_to_half(values: Tensor) -> Tensor:
    """``values`` rounded to float16, as float32: a grid must be searched with the numbers that are stored."""
    return values.half().float()


def global_scale_of(weight: Tensor) -> Tensor:
    """The power of two by which ``weight`` is divided to bring its largest magnitude near ``2 ** 14``, well inside float16."""
    largest = max(float(end.abs()) for end in weight.aminmax()) if weight.numel() else 0.0
    exponent = max(-126, min(126, math.frexp(largest)[1] - 14)) if largest else 0
    return torch.tensor([math.ldexp(1.0, exponent)], dtype=torch.float32, device=weight.device)
