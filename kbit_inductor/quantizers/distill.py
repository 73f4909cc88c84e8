"""The codes of GPTQ on grids that are tuned until the whole model predicts what it did in float.

Chen et al., "EfficientQAT" (2024): of its two phases the second, which trains scales alone, end to end, with the codes held fixed.
Here the offsets are trained too, and the aim is not the next token of a text but the float model's own prediction, so that little
text is enough. Whoever has the model trains (:mod:`kbit_inductor.calibrating.distillation`), and hands the grids back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import pack_codes
from kbit_inductor.quantizers.autoround import through
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.gptq import gptq
from kbit_inductor.quantizers.grid import Quantized, round_to_half
from kbit_inductor.quantizers.learned import Learned, error_of
from kbit_inductor.quantizers.learned_or_gptq import learned_or_gptq
from kbit_inductor.quantizers.statistics import Statistics


def distill(weight: Tensor, format: Format, statistics: Statistics | None = None) -> Quantized:
    """The codes of ``weight`` ``[N, K]`` with the grids that were learned for them; where there are none, those of ``"gptq"``."""
    return learned_or_gptq("distill", weight, format, statistics)


class TunedGrids:
    """The codes of ``"gptq"`` for the weight ``[N, K]``, on a grid whose scale and offset are variables.

    Attributes:
        variables: what to take gradients by: the relative growth of each scale, ``[N, G]``, and the shift of each offset in
            scales, ``[N, G]``, unless symmetric.
    """

    def __init__(self, weight: Tensor, format: Format, statistics: Statistics | None) -> None:
        self.weight, self.format = weight, format
        self.begun = gptq(weight, format, statistics)
        self.group = torch.arange(weight.size(1), device=weight.device) // format.group_size
        self.table = format.levels.table(weight.device)
        self.scale = self.begun.scale.float()
        self.variables = [torch.zeros_like(self.scale) for _ in (self.begun.scale, self.begun.offset) if _ is not None]
        for variable in self.variables:
            variable.requires_grad_()

    def dequantized(self) -> Tensor:
        """The values ``[N, K]`` that the codes stand for now, in the dtype of the weight."""
        codes = self.begun.codes
        levels = codes.float() if self.table is None else self.table.float()[codes.int()]
        scale, offset = self._grids()
        wide = scale[:, self.group]
        base = -wide * self.format.levels.midpoint if offset is None else offset[:, self.group]
        return torch.addcmul(base, levels, wide).mul(self.begun.global_scale).to(self.weight.dtype)

    @torch.no_grad()
    def learned(self, variables: Sequence[Tensor]) -> Learned:
        """The codes, and the grids that ``variables`` stand for."""
        self.variables = list(variables)
        scale, offset = (None if grid is None else grid.half() for grid in self._grids())
        codes, global_scale = self.begun.codes, self.begun.global_scale
        found = Quantized(codes, scale, offset, global_scale, 0.0)  # type: ignore[arg-type]
        error = error_of(self.weight, found, self.format)
        none = codes.new_empty(0, codes.size(1))
        packed = pack_codes(codes, self.format.bits)
        return Learned(self.format, packed, Quantized(none, scale, offset, global_scale, error))  # type: ignore[arg-type]

    def _grids(self) -> tuple[Tensor, Tensor | None]:
        """Scale and offset ``[N, G]``, as they will be stored; gradients pass through that rounding."""
        scale = through(round_to_half, self.scale * (1 + self.variables[0]))
        if self.begun.offset is None:
            return scale, None
        return scale, through(round_to_half, self.begun.offset.float() + self.variables[1] * self.scale)
