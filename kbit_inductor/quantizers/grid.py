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


FindGrid = Callable[[Tensor, Levels, bool], tuple[Tensor, Tensor | None]]
"""``(groups [R, g] float32, levels, symmetric) -> (scale [R], offset [R] or None)``, both rounded to float16, as float32."""


@dataclass(frozen=True)
class Method:
    """How the grid of a group is found: a PyTorch function, which defines it, and its parameters for the compiled form.

    Attributes:
        find_grid: the function.
        candidates: grids tried before the least-squares refit, the full range among them; 0 for the full range as it is.
        lowest_shrink: width of the narrowest candidate, relative to the full range.
        highest_shrink: that of the widest.
    """

    find_grid: FindGrid
    candidates: int = 0
    lowest_shrink: float = 1.0
    highest_shrink: float = 1.0


def quantize_groups(weight: Tensor, levels: Levels, group_size: int, symmetric: bool, method: Method) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` of any floating dtype, with one grid per group of columns."""
    compiled = quantize_operator(weight)
    if compiled is None:
        return _quantize_in_pytorch(weight, levels, group_size, symmetric, method.find_grid)
    global_scale = _global_scale(weight)
    codes, scale, offset, errors = compiled(
        weight, float(global_scale), levels.bits, group_size, symmetric, method.lowest_shrink, method.highest_shrink,
        method.candidates, levels.table(weight.device),
    )  # fmt: skip
    squared_error, squared_norm = errors.sum(dim=0).tolist()
    return Quantized(codes, scale, None if symmetric else offset, global_scale, _ratio(squared_error, squared_norm))


def _quantize_in_pytorch(weight: Tensor, levels: Levels, group_size: int, symmetric: bool, find_grid: FindGrid) -> Quantized:
    """A few rows at a time."""
    rows, columns = weight.shape
    result = _empty(rows, columns, group_size, symmetric, weight)
    squared_error = squared_norm = 0.0
    whole = columns // group_size * group_size
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values = weight[part].float() / result.global_scale
        squared_norm += float(values.square().sum(dtype=torch.float64))
        # The last group of a row may be shorter; it gets a grid for what it has.
        for first, end, width in ((0, whole, group_size), (whole, columns, columns - whole)):
            if first < end:
                groups = values[:, first:end].reshape(-1, width)
                grids = slice(first // group_size, -(-end // group_size))
                squared_error += _fill(result, part, slice(first, end), grids, groups, levels, find_grid)
    return dataclasses.replace(result, error=_ratio(squared_error, squared_norm))


def _ratio(squared_error: float, squared_norm: float) -> float:
    return squared_error / squared_norm if squared_norm else 0.0


def _empty(rows: int, columns: int, group_size: int, symmetric: bool, weight: Tensor) -> Quantized:
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, group_count(columns, group_size), dtype=torch.float16, device=weight.device)
    offset = None if symmetric else torch.empty_like(scale)
    return Quantized(codes, scale, offset, _global_scale(weight), 0.0)


def _fill(
    result: Quantized, rows: slice, columns: slice, grids: slice, groups: Tensor, levels: Levels, find_grid: FindGrid
) -> float:
    """Quantize ``groups`` into a block of ``result``, and return the squared error."""
    scale, offset = find_grid(groups, levels, result.offset is None)
    nearest = encode(groups, scale, offset, levels)
    count = rows.stop - rows.start
    result.codes[rows, columns] = levels.codes(nearest).view(count, -1)
    result.scale[rows, grids] = scale.view(count, -1).half()
    if result.offset is not None and offset is not None:
        result.offset[rows, grids] = offset.view(count, -1).half()
    return float((groups - decode(nearest, scale, offset, levels)).square().sum(dtype=torch.float64))


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


def _global_scale(weight: Tensor) -> Tensor:
    """The power of two by which ``weight`` is divided to bring its largest magnitude near ``2 ** 14``, well inside float16."""
    largest = max(float(end.abs()) for end in weight.aminmax()) if weight.numel() else 0.0
    exponent = max(-126, min(126, math.frexp(largest)[1] - 14)) if largest else 0
    return torch.tensor([math.ldexp(1.0, exponent)], dtype=torch.float32, device=weight.device)
