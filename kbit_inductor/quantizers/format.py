"""What a quantizer is asked for: the form of the codes, whatever method finds them."""

from __future__ import annotations

from dataclasses import dataclass

from kbit_inductor.quantizers.codebooks import Codebook
from kbit_inductor.quantizers.levels import Levels


@dataclass(frozen=True)
class Format:
    """How the codes of a weight ``[N, K]`` are stored (docs/format.md).

    Args:
        bits: bits per code, 1 to 8.
        group_size: columns that share a grid, at least 1; the last group of a row may be shorter.
        symmetric: a grid is a scale alone, without an offset.
        codebook: the levels that codes stand for; None where every code is its own level.
    """

    bits: int
    group_size: int
    symmetric: bool = False
    codebook: Codebook | None = None

    @property
    def levels(self) -> Levels:
        """The levels between which codes choose."""
        return Levels(self.bits, self.codebook)
