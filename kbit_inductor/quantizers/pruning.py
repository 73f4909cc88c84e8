"""Entries of a weight set to zero before it is quantized, on a grid that holds zero exactly.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda, 2023): an entry counts by its magnitude
times the root of E[x²] of its column, and competes with those of its row. Without statistics that is magnitude pruning (Han et al.,
2015). Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), have N of each M neighbours (2:4). Truncation cuts what is
below a threshold, however much that is.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from kbit_inductor.quantizers.statistics import Statistics

Sparsity = float | str
"""A share of the entries of each row; ``"N:M"``: at most N of each M neighbours of a row stay; or ``"<δ"``: what is smaller than
the number δ is cut."""


def is_sparsity(value: object) -> bool:
    """Whether ``value`` is a share, 0 or more and below 1, ``"N:M"`` with 1 <= N < M, or ``"<δ"`` with δ > 0 and finite."""
    if isinstance(value, str):
        if value.startswith("<"):
            return _threshold(value) is not None
        found = re.fullmatch(r"(\d+):(\d+)", value)
        return found is not None and 1 <= int(found[1]) < int(found[2])
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def pruned(weight: Tensor, sparsity: Sparsity, statistics: Statistics | None = None) -> Tensor:
    """``weight`` ``[N, K]`` with its least entries set to zero; of equal ones the first stay.

    By a threshold it is magnitudes alone that count.
    """
    threshold = _threshold(sparsity) if isinstance(sparsity, str) else None
    if threshold is not None:
        return torch.where(weight.abs() < threshold, torch.zeros((), dtype=weight.dtype, device=weight.device), weight)
    scores = weight.float().abs()
    if statistics is not None:
        scores = scores * statistics.importance().sqrt().to(scores)
    if not isinstance(sparsity, str):
        kept = _best(scores, weight.size(1) - int(sparsity * weight.size(1)))
    else:
        count, width = (int(number) for number in sparsity.split(":"))
        missing = -weight.size(1) % width
        blocks = torch.nn.functional.pad(scores, (0, missing), value=-1.0).view(
            len(weight), (weight.size(1) + missing) // width, width
        )
        kept = _best(blocks, count).flatten(1)[:, : weight.size(1)]
    return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _threshold(sparsity: str) -> float | None:
    """The number in ``"<δ"``, positive and finite; None where there is none."""
    if re.fullmatch(r"<\d*\.?\d+([eE][+-]?\d+)?", sparsity) is None:
        return None
    threshold = float(sparsity[1:])
    return threshold if 0 < threshold < math.inf else None


def _best(scores: Tensor, count: int) -> Tensor:
    """Which are the ``count`` largest along the last dimension, bool."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)
