"""Column by column, with what each column's rounding does to the output made good by the columns that are still to come.

Frantar et al., "GPTQ" (2022), after Hassibi and Stork's Optimal Brain Surgeon (1992). Columns come in the order of falling E[x²]
("act-order"), group by group, so that the grid of a group is found for the values that its columns have by then; grids are those of
the clip search, which weighs a column by what is left of its variance once all later columns have done their best.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import group_count
from kbit_inductor.logs import logger
from kbit_inductor.quantizers.clip import clip, find_grids, search
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.grid import Quantized, global_scale_of, quantize_groups, ratio
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.quantizers.statistics import Statistics

log = logger("pack")
DAMPING = 0.2  # of the mean of the diagonal, added to it: the Hessian is an estimate from few rows of other data than will come


def gptq(weight: Tensor, format: Format, statistics: Statistics | None = None) -> Quantized:
    """Quantize ``weight`` ``[N, K]`` by GPTQ; without a Hessian, or with one that cannot be factored, as ``"clip"`` does."""
    if statistics is None or statistics.hessian is None or not weight.numel():
        return clip(weight, format, statistics)
    with one_thread():
        order = column_order(statistics.hessian.diagonal(), format.group_size)
        factor = inverse_factor(statistics.hessian, order)
        if factor is None:
            log.warning(
                "gptq: the Hessian of a weight of %d columns (%d rows of calibration) cannot be factored; quantizing it by 'clip'. "
                "More calibration data mends that",
                weight.size(1), statistics.rows,
            )  # fmt: skip
            return clip(weight, format, statistics)
        return _Compensation(weight, format, order, factor.to(weight.device)).run()


def column_order(diagonal: Tensor, group_size: int) -> Tensor:
    """The columns, groups by falling mean of ``diagonal`` ``[K]`` and each group's columns by falling value."""
    columns = len(diagonal)
    group = torch.arange(columns, device=diagonal.device) // group_size
    total = diagonal.new_zeros(group_count(columns, group_size)).index_add_(0, group, diagonal)
    by_value = diagonal.argsort(descending=True, stable=True)
    rank = torch.empty_like(total).index_copy_(
        0, (total / torch.bincount(group)).argsort(descending=True, stable=True), torch.arange(len(total)).to(total)
    )
    return by_value[rank[group[by_value]].argsort(stable=True)]


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor | None:
    """The upper Cholesky factor, float32 ``[K, K]``, of the inverse of the damped Hessian with its columns in ``order``; None where
    there is none."""
    damped = hessian[order][:, order].double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1  # a column without input: any value will do
    diagonal += DAMPING * float(diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper.float()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums come out the same whatever the number of threads, since there is one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Grid:
    """The grid of each row for one group of columns."""

    scale: Tensor
    offset: Tensor | None
    levels: Levels

    def __post_init__(self) -> None:
        self.inverse = torch.where(self.scale == 0, 0.0, 1.0 / self.scale)
        self.zero = self.levels.midpoint if self.offset is None else -self.offset * self.inverse
        self.base = -self.scale * self.levels.midpoint if self.offset is None else self.offset

    def nearest(self, column: Tensor) -> Tensor:
        return self.levels.nearest(column * self.inverse + self.zero)

    def value(self, nearest: Tensor) -> Tensor:
        return torch.addcmul(self.base, nearest, self.scale)


class _Compensation:
    """The state of one weight while its columns are rounded. Columns are rows here, so that each lies together in memory."""

    def __init__(self, weight: Tensor, format: Format, order: Tensor, factor: Tensor) -> None:
        self.weight, self.format, self.order, self.factor = weight, format, order, factor
        self.levels = format.levels
        self.global_scale = global_scale_of(weight)
        self.original = (weight.float() / self.global_scale).t()[order].contiguous()
        self.left = self.original.clone()
        rows, columns = weight.shape
        groups = group_count(columns, format.group_size)
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
        self.scale = torch.empty(rows, groups, dtype=torch.float16, device=weight.device)
        self.offset = None if format.symmetric else torch.empty_like(self.scale)
        self.squared_error = 0.0

    def run(self) -> Quantized:
        begin, columns = 0, len(self.order)
        while begin < columns:
            group = int(self.order[begin]) // self.format.group_size
            width = min(self.format.group_size, columns - group * self.format.group_size)
            self._round_group(group, begin, begin + width)
            begin += width
        codes = torch.empty_like(self.codes).index_copy_(0, self.order, self.codes).t().contiguous()
        error = ratio(self.squared_error, float(self.original.square().sum(dtype=torch.float64)))
        return Quantized(codes, self.scale, self.offset, self.global_scale, error)

    def _round_group(self, group: int, begin: int, end: int) -> None:
        factor = self.factor[begin:end]
        grid = self._find_grid(group, begin, end)
        errors = torch.empty_like(self.left[begin:end])
        for i in range(begin, end):
            nearest = grid.nearest(self.left[i])
            value = grid.value(nearest)
            self.codes[i] = self.levels.codes(nearest)
            self.squared_error += float((value - self.original[i]).square().sum(dtype=torch.float64))
            errors[i - begin] = (self.left[i] - value) / factor[i - begin, i]
            self.left[i + 1 : end].addr_(factor[i - begin, i + 1 : end], errors[i - begin], alpha=-1)
        self.left[end:].addmm_(factor[:, end:].t(), errors, alpha=-1)

    def _find_grid(self, group: int, begin: int, end: int) -> _Grid:
        importance = self.factor.diagonal()[begin:end].square().reciprocal()
        importance = importance / importance.max()
        block = self.left[begin:end].t().contiguous()
        one = torch.ones(1, device=block.device)
        found = quantize_groups(block, self.format, find_grids, search(self.levels), importance, one)
        self.scale[:, group] = found.scale[:, 0]
        if self.offset is None or found.offset is None:
            return _Grid(found.scale[:, 0].float(), None, self.levels)
        self.offset[:, group] = found.offset[:, 0]
        return _Grid(found.scale[:, 0].float(), found.offset[:, 0].float(), self.levels)
