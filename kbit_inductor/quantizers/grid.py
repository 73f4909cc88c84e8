"""Groups of a weight, the affine grid of a group, and the codes that a grid gives: what every quantizer shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import group_count, midpoint

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


FindGrid = Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]
"""``(groups [R, g] float32, bits, symmetric) -> (scale [R], offset [R] or None)``, both rounded to float16, as float32."""


def quantize_groups(weight: Tensor, bits: int, group_size: int, symmetric: bool, find_grid: FindGrid) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` of any floating dtype, a few rows at a time, with one grid per group of columns."""
    rows, columns = weight.shape
    groups = group_count(columns, group_size)
    device = weight.device
    exponent = _range_exponent(weight)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    scale = torch.empty(rows, groups, dtype=torch.float16, device=device)
    offset = None if symmetric else torch.empty_like(scale)
    squared_error = squared_norm = 0.0
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows if columns else 0, step):
        part = slice(start, min(start + step, rows))
        values = torch.ldexp(weight[part].float(), torch.tensor(exponent, device=device))
        grouped = _to_groups(values, group_size)
        part_scale, part_offset = find_grid(grouped, bits, symmetric)
        part_codes = encode(grouped, part_scale, part_offset, bits)
        restored = decode(part_codes, part_scale, part_offset, bits).view(values.size(0), -1)[:, :columns]
        squared_error += float((values - restored).square().sum(dtype=torch.float64))
        squared_norm += float(values.square().sum(dtype=torch.float64))
        codes[part] = part_codes.view(values.size(0), -1)[:, :columns].to(torch.uint8)
        scale[part] = part_scale.view(-1, groups).half()
        if offset is not None and part_offset is not None:
            offset[part] = part_offset.view(-1, groups).half()
    global_scale = torch.tensor([math.ldexp(1.0, -exponent)], dtype=torch.float32, device=device)
    return Quantized(codes, scale, offset, global_scale, squared_error / squared_norm if squared_norm else 0.0)


def encode(groups: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> Tensor:
    """Nearest codes, as float32 ``[R, g]``, of ``groups`` on the grids ``scale`` ``[R]`` and ``offset``; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale).unsqueeze(-1)
    zero = midpoint(bits) if offset is None else (-offset.unsqueeze(-1) * inverse)
    return (groups * inverse + zero).round_().clamp_(0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> Tensor:
    """The values ``[R, g]`` of ``codes`` on the grids."""
    if offset is None:
        return (codes - midpoint(bits)) * scale.unsqueeze(-1)
    return torch.addcmul(offset.unsqueeze(-1), codes, scale.unsqueeze(-1))


def round_to_half(values: Tensor) -> Tensor:
    """``values`` rounded to float16, as float32: a grid must be searched with the numbers that are stored."""
    return values.half().float()


def _range_exponent(weight: Tensor) -> int:
    """``e`` such that ``weight * 2 ** e`` has its largest magnitude near ``2 ** 14``, well inside float16."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest == 0.0:
        return 0
    return max(-126, min(126, 14 - math.frexp(largest)[1]))


def _to_groups(values: Tensor, group_size: int) -> Tensor:
    """Rows ``[n, K]`` as groups ``[n * G, group_size]``; the last group of a row is filled with the row's last value,
    which leaves its minimum and maximum as they are."""
    columns = values.size(1)
    missing = -columns % group_size
    if missing:
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)
    return values.reshape(-1, group_size)
