"""Codes that were learned elsewhere, with the model at hand, for one weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import unpack_codes
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.grid import Quantized, ratio

SAME = 1e-6  # relative difference of errors, sums in another order


@dataclass(frozen=True, eq=False)
class Learned:
    """Codes of ``format`` that were learned for one weight: those of ``quantized``, which holds none, as ``planes``.

    They are of no use for another weight; that a weight is the same is seen by its error, computed alike.
    """

    format: Format
    planes: Tensor
    quantized: Quantized

    def of(self, weight: Tensor, format: Format) -> Quantized | None:
        """The codes for ``weight`` ``[N, K]``; None where they were learned for another format or weight."""
        if format != self.format or weight.shape != (self.planes.size(1), weight.size(-1)):
            return None
        codes = unpack_codes(self.planes, weight.size(1)).to(weight.device)
        found = self.quantized
        grid = (found.scale, found.offset, found.global_scale)
        scale, offset, global_scale = (None if part is None else part.to(weight.device) for part in grid)
        made = Quantized(codes, scale, offset, global_scale, found.error)  # type: ignore[arg-type]
        return made if math.isclose(error_of(weight, made, format), found.error, rel_tol=SAME) else None


def error_of(weight: Tensor, quantized: Quantized, format: Format) -> float:
    """Squared error over squared norm."""
    values = weight.float() / quantized.global_scale
    lost = (on_grid(quantized, format) - values).square().sum(dtype=torch.float64)
    return ratio(float(lost), float(values.square().sum(dtype=torch.float64)))


def on_grid(quantized: Quantized, format: Format) -> Tensor:
    """What the codes stand for, float32 ``[N, K]``, before the global scale."""
    group = torch.arange(quantized.codes.size(1), device=quantized.codes.device) // format.group_size
    table = format.levels.table(quantized.codes.device)
    levels = quantized.codes.float() if table is None else table.float()[quantized.codes.int()]
    scale = quantized.scale.float()[:, group]
    base = -scale * format.levels.midpoint if quantized.offset is None else quantized.offset.float()[:, group]
    return torch.addcmul(base, levels, scale)
