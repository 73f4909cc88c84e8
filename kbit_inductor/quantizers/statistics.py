"""What calibration tells a quantizer of the inputs of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.quantizers.learned import Learned


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of the inputs ``x`` ``[..., K]`` of one layer, means over all rows seen.

    Attributes:
        mean_square: E[x²] of each column, float32 ``[K]``.
        hessian: E[x xᵀ], float32 ``[K, K]``, half the second derivative of the squared output error; None where not asked for.
        rows: how many rows were seen.
        learned: codes that were learned for the layer's weight; None where not asked for.
        mean: E[x] of each column, float32 ``[K]``; None where not known.
    """

    mean_square: Tensor
    hessian: Tensor | None = None
    rows: int = 0
    learned: Learned | None = None
    mean: Tensor | None = None

    def evened(self) -> Statistics:
        """Half these, half those of a look-up, for which all columns count alike: of a weight that is used both ways."""
        mean = self.mean_square.mean()
        hessian = None if self.hessian is None else (self.hessian + mean * torch.eye(len(self.hessian)).to(self.hessian)) / 2
        return Statistics((self.mean_square + mean) / 2, hessian, self.rows, mean=self.mean)

    def importance(self) -> Tensor:
        """The weight of each column's squared error, float32 ``[K]``: E[x²] over its mean. No column weighs nothing, so that every
        grid stays determined."""
        mean = self.mean_square.mean(dtype=torch.float64)
        if not bool(mean > 0):
            return torch.ones_like(self.mean_square)
        return (self.mean_square / mean).float().clamp_(min=LEAST_IMPORTANCE)


LEAST_IMPORTANCE = 1e-6  # of the mean: its squared error counts, but never against another column's
