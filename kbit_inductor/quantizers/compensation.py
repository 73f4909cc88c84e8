"""What is added to a product of codes to make good what the codes have lost, found from the weight, its codes and statistics.

A low-rank term is the best approximation of the lost part by singular values (LoRC of ZeroQuant-V2: Yao et al., 2023). With
statistics the error of outputs counts, not that of the weight: by E[x²] of each column (LQER: Zhang et al., 2024), or by E[x xᵀ],
which is exact (QERA: Zhang et al., 2024). Columns for inputs that are outliers stay in float, as in LLM.int8() (Dettmers et al.,
2022); which they are, E[x²] times the squared error of the column tells, as SpQR (Dettmers et al., 2023) has it for entries. The
mean error of an output goes into its bias (Nagel et al., "Data-Free Quantization", 2019; Banner et al., 2019).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kbit_inductor.quantizers.clip import clip
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.gptq import one_thread
from kbit_inductor.quantizers.learned import on_grid
from kbit_inductor.quantizers.statistics import Statistics

DAMPING = 0.01  # of the mean of the diagonal of E[x xᵀ], added to it: it may be singular


def low_rank(error: Tensor, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``B`` ``[N, rank]`` and ``A`` ``[rank, K]`` whose product is nearest to ``error`` ``[N, K]``, by singular values.

    ``root`` says what counts: None the squares of ``error``; a vector ``[K]``, positive, those of ``error * root``; a lower
    triangular matrix ``[K, K]`` of full rank those of ``error @ root``. Past the rank of ``error``, zeros.
    """
    root = None if root is None else root.to(error)
    with one_thread():
        scaled = error if root is None else error * root if root.dim() == 1 else error @ root
        left, values, right = torch.linalg.svd(scaled, full_matrices=False)
        kept = min(rank, len(values))
        up, down = error.new_zeros(error.size(0), rank), error.new_zeros(rank, error.size(1))
        up[:, :kept] = left[:, :kept] * values[:kept].sqrt()
        halves = values[:kept].sqrt()[:, None] * right[:kept]
        if root is not None:
            halves = halves / root if root.dim() == 1 else torch.linalg.solve_triangular(root, halves, upper=False, left=False)
        down[:kept] = halves
    return up, down


def root_of(statistics: Statistics | None) -> Tensor | None:
    """What ``statistics`` say of how the error of a weight counts, as :func:`low_rank` takes it."""
    if statistics is None:
        return None
    if statistics.hessian is None:
        return statistics.importance().sqrt()
    damped = statistics.hessian.double()
    mean = damped.diagonal().mean()
    if not mean > 0:
        return None
    damped = damped / mean
    damped.diagonal().add_(DAMPING)
    with one_thread():
        lower, failed = torch.linalg.cholesky_ex(damped)
    return statistics.importance().sqrt() if failed else lower.float()


def outlier_columns(weight: Tensor, format: Format, count: int, statistics: Statistics | None = None) -> Tensor:
    """``count`` columns of ``weight`` ``[N, K]`` without which the others are rounded well, int32, ascending.

    Those that lose most, or those that are largest, which is what makes the others of their groups lose: the better of the two.
    """
    counts = torch.ones(weight.size(1)) if statistics is None else statistics.importance()
    lost = _lost(weight, format, statistics)
    largest = weight.double().square().sum(0)
    tried = []
    for squares in (lost, largest):
        order = (squares * counts.to(squares)).argsort(descending=True, stable=True)  # of equal ones the first
        columns = order[:count].sort().values.int()
        held, told = without_columns(weight, columns, statistics)
        left = _lost(held, format, told).index_fill(0, columns.long(), 0.0)
        tried.append((float(left @ counts.to(left)), columns))
    return min(tried, key=lambda one: one[0])[1]


def _lost(weight: Tensor, format: Format, statistics: Statistics | None) -> Tensor:
    """The squared error of each column as the clip search rounds it, float64 ``[K]``."""
    rounded = clip(weight, format, statistics)
    error = weight.float() / rounded.global_scale - on_grid(rounded, format)
    return error.square().sum(0, dtype=torch.float64) * rounded.global_scale.double().square()


def without_columns(weight: Tensor, columns: Tensor, statistics: Statistics | None) -> tuple[Tensor, Statistics | None]:
    """``weight`` with zeros in ``columns``, and ``statistics`` of what the floats of these columns cannot make good.

    Of E[x xᵀ] that is the Schur complement of the block of ``columns``: what is left of the other inputs when these are known.
    """
    index = columns.long()
    weight = weight.index_fill(1, index, 0.0)
    if statistics is None:
        return weight, None
    told = index.to(statistics.mean_square.device)
    hessian, mean_square = statistics.hessian, statistics.mean_square
    if hessian is not None:
        left = hessian.double() - hessian[:, told].double() @ _regression(hessian, told).t()
        hessian = left.index_fill(0, told, 0.0).index_fill(1, told, 0.0).float()
        mean_square = hessian.diagonal().clamp(min=0.0)
    mean_square = mean_square.index_fill(0, told, 0.0)
    return weight, dataclasses.replace(statistics, mean_square=mean_square, hessian=hessian)


def float_columns(lost: Tensor, columns: Tensor, statistics: Statistics | None) -> Tensor:
    """What ``columns``, int32 ``[c]``, are to add to what codes stand for that have lost ``lost`` ``[N, K]``: ``[N, c]``.

    That is what the codes have lost there; with E[x xᵀ] also the best prediction, from these inputs, of what the others lose.
    """
    index = columns.long()
    kept = lost.index_select(1, index)
    if statistics is None or statistics.hessian is None:
        return kept
    predicted = _regression(statistics.hessian, index.to(statistics.hessian.device)).to(lost)
    return kept + lost.index_fill(1, index, 0.0) @ predicted


def _regression(hessian: Tensor, index: Tensor) -> Tensor:
    """By what the inputs ``index`` predict all inputs best, float64 ``[K, c]``; ridge regression."""
    across = hessian[:, index].double()
    block = across[index]
    ridge = DAMPING * float(hessian.diagonal().double().mean())
    if not ridge > 0:
        return torch.zeros_like(across)
    block.diagonal().add_(ridge)
    with one_thread():
        solved: Tensor = torch.linalg.solve(block, across.t())
    return solved.t()


def mean_output(lost: Tensor, statistics: Statistics | None) -> Tensor:
    """``lost @ E[x]`` for ``lost`` ``[N, K]``: what its outputs lack on average, ``[N]``; zeros where no means are known."""
    if statistics is None or statistics.mean is None:
        return lost.new_zeros(lost.size(0))
    return lost @ statistics.mean.to(lost)
