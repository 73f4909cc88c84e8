"""The levels between which a quantizer chooses, and the nearest one of a value."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import level_bits, midpoint
from kbit_inductor.quantizers.codebooks import Codebook


@dataclass(frozen=True)
class Levels:
    """What codes of ``bits`` stand for: the codes themselves, or the levels of ``codebook``."""

    bits: int
    codebook: Codebook | None = None

    @property
    def lowest(self) -> int:
        """The level of code 0."""
        return self.codebook[0] if self.codebook else 0

    @property
    def highest(self) -> int:
        """The level of the last code."""
        return self.codebook[-1] if self.codebook else 2**self.bits - 1

    @property
    def midpoint(self) -> float:
        """The level that means zero in a symmetric grid."""
        return midpoint(level_bits(self.bits, self.codebook is not None))

    def table(self, device: torch.device) -> Tensor | None:
        """The codebook as the operators take it, uint8 ``[2 ** bits]``; None where every code is its own level."""
        return None if self.codebook is None else torch.tensor(self.codebook, dtype=torch.uint8, device=device)

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest level of each of ``values``, both float32 of any shape; ``values`` may be overwritten."""
        if self.codebook is None:
            return values.round_().clamp_(0, self.highest)
        return nearest_levels(self.codebook, values.device)[values.mul_(2).floor_().clamp_(0, 511).int()]

    def codes(self, levels: Tensor) -> Tensor:
        """The uint8 codes of ``levels``, each of which must be one."""
        if self.codebook is None:
            return levels.to(torch.uint8)
        table = torch.tensor(self.codebook, dtype=torch.float32, device=levels.device)
        return torch.searchsorted(table, levels.contiguous()).to(torch.uint8)


@functools.cache
def nearest_levels(codebook: Codebook, device: torch.device) -> Tensor:
    """The level nearest to ``i / 2 .. (i + 1) / 2`` in entry ``i``, float32 ``[512]``: levels are integers below 256, so the values
    half way between two of them are multiples of one half."""
    levels = torch.tensor(codebook, dtype=torch.float32, device=device)
    halves = torch.arange(512, dtype=torch.float32, device=device) / 2
    return levels[torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2, right=True)]
