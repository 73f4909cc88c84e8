"""Rounding that is learned: which of its two neighbours a value goes to, and the grid of each group, by signed gradient descent.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent" (SignRound, 2023; AutoRound). Theirs moves the ends of the full
range of a group; here scale and offset move, and the search of :mod:`.clip` tells where they begin. What the error is, is not said
here: whoever has the model minimizes that of a block's output (:mod:`kbit_inductor.calibrating.reconstruct`), and hands the codes
back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import pack_codes
from kbit_inductor.quantizers.clip import clip
from kbit_inductor.quantizers.format import Format
from kbit_inductor.quantizers.grid import Quantized, round_to_half
from kbit_inductor.quantizers.learned import Learned, error_of
from kbit_inductor.quantizers.learned_or_gptq import learned_or_gptq
from kbit_inductor.quantizers.statistics import Statistics

SCALE_RATE = 0.2  # of the rate of the rounding: a scale moves all values of its group


def autoround(weight: Tensor, format: Format, statistics: Statistics | None = None) -> Quantized:
    """The codes that were learned for ``weight`` ``[N, K]``; where there are none, those of ``"gptq"``."""
    return learned_or_gptq("autoround", weight, format, statistics)


class LearnedRounding:
    """The weight ``[N, K]`` on a grid whose scale, offset and roundings are variables, begun at the codes of ``"clip"``.

    Attributes:
        variables: what to take gradients by: the shift of each position before it is rounded, ``[N, K]``, at most half a step; the
            relative growth of each scale, ``[N, G]``; and the shift of each offset in steps, ``[N, G]``, unless symmetric.
    """

    def __init__(self, weight: Tensor, format: Format, statistics: Statistics | None) -> None:
        begun = clip(weight, format, statistics)
        self.weight, self.format, self.levels = weight, format, format.levels
        self.global_scale = begun.global_scale
        self.values = weight.float() / self.global_scale
        self.group = torch.arange(weight.size(1), device=weight.device) // format.group_size
        self.scale, self.offset = begun.scale.float(), None if begun.offset is None else begun.offset.float()
        self.gap = (self.levels.highest - self.levels.lowest) / (2**format.bits - 1)
        self.variables = [torch.zeros_like(self.values), torch.zeros_like(self.scale)]
        if self.offset is not None:
            self.variables.append(torch.zeros_like(self.scale))
        for variable in self.variables:
            variable.requires_grad_()

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Move each variable against the sign of its gradient, by ``rate`` or a share of it."""
        with torch.no_grad():
            rates = (rate, rate * SCALE_RATE, rate)
            for variable, gradient, own in zip(self.variables, gradients, rates, strict=False):
                variable.sub_(gradient.sign(), alpha=own)
            self.variables[0].clamp_(-0.5, 0.5)

    def dequantized(self) -> Tensor:
        """The values ``[N, K]`` that the codes stand for now, in the dtype of the weight; gradients pass through the rounding."""
        scale, base, levels = self._grid()
        return torch.addcmul(base, levels, scale).mul(self.global_scale).to(self.weight.dtype)

    def snapshot(self) -> list[Tensor]:
        """The variables as they are."""
        return [variable.detach().clone() for variable in self.variables]

    @torch.no_grad()
    def learned(self, variables: Sequence[Tensor]) -> Learned:
        """The codes that ``variables`` stand for."""
        self.variables = list(variables)
        levels = self._grid()[2]
        scale = self._scale().half()
        offset = None if self.offset is None else self._offset().half()
        codes = self.levels.codes(levels)
        found = Quantized(codes, scale, offset, self.global_scale, 0.0)
        error = error_of(self.weight, found, self.format)
        none = codes.new_empty(0, codes.size(1))
        return Learned(self.format, pack_codes(codes, self.format.bits), Quantized(none, scale, offset, self.global_scale, error))

    def _scale(self) -> Tensor:
        return through(round_to_half, self.scale * (1 + self.variables[1]))

    def _offset(self) -> Tensor:
        return through(round_to_half, self.offset + self.variables[2] * self.gap * self.scale)

    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and value of level 0 of each column, and its level, all ``[N, K]``."""
        scale = self._scale()[:, self.group]
        base = -scale * self.levels.midpoint if self.offset is None else self._offset()[:, self.group]
        inverse = torch.where(scale == 0, 0.0, 1.0 / torch.where(scale == 0, 1.0, scale))
        position = (self.values - base) * inverse + self.variables[0] * self.gap
        inside = position.clamp(self.levels.lowest, self.levels.highest)
        return scale, base, through(lambda at: self.levels.nearest(at.clone()), inside)


def through(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """``function(values)``, with the gradient of the identity."""
    return values + (function(values.detach()) - values).detach()
