"""Codebooks: levels that are no even grid, for weights that are distributed like a Gaussian.

A codebook of k bits is ``2 ** k`` ascending levels, each a byte; zero is level 128 (:mod:`kbit_inductor.kernels.layout`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from kbit_inductor._compat import no_modes
from kbit_inductor.kernels.layout import MAX_BITS, midpoint, takes_codebook

UNIFORM = "uniform"
Codebook = tuple[int, ...]
CONVERGED = 1e-7  # of a standard deviation: far below half a level
ZERO = int(midpoint(MAX_BITS))


def lloyd_max(bits: int) -> Tensor:
    """The ``2 ** bits`` levels, float64, that hold a standard Gaussian with the least squared error.

    Lloyd (1982) and Max (1960): in turn, each value goes to its nearest level, and each level to the mean of its values.
    """
    count = 2**bits
    # The best levels of many are spaced as the quantiles of a Gaussian of variance 3 (Panter and Dite, 1951).
    middles = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
    levels: Tensor = math.sqrt(3) * torch.special.ndtri(middles)
    moved = math.inf
    while moved > CONVERGED:
        _, mean = _cells(levels)
        moved = float((mean - levels).abs().max())
        levels = mean
    return levels


def distortion(levels: Tensor) -> float:
    """The mean squared error of a standard Gaussian on ``levels``, float64 and ascending."""
    probability, mean = _cells(levels)
    return float(1 - (probability * (2 * mean * levels - levels.square())).sum())


def _cells(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and mean of the values of a standard Gaussian that are nearest to each level."""
    infinity = levels.new_full((1,), math.inf)
    ends = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
    probability = torch.special.ndtr(ends).diff()
    density = torch.exp(-ends.square() / 2) / math.sqrt(2 * math.pi)
    return probability, -density.diff() / probability


def normal_float(bits: int) -> Tensor:
    """The ``2 ** bits`` levels, float64 from -1 to 1, of NormalFloat: quantiles of a Gaussian, zero among them.

    Dettmers et al., "QLoRA" (2023), whose NF4 this is at 4 bits: one side has a level more than the other, and the outermost
    quantile lies half way between those of both sides.
    """
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(0.5, outermost, count, dtype=torch.float64, device="cpu"))[1:]
        for count in (half + 1, half)
    )
    levels = torch.cat([-below.flip(0), above.new_zeros(1), above])
    return levels / levels[-1]


CODEBOOKS: Mapping[str, Callable[[int], Tensor]] = MappingProxyType({"normal": lloyd_max, "nf": normal_float})
CODEBOOK_NAMES = (UNIFORM, *CODEBOOKS)


@functools.cache
def codebook(name: str, bits: int) -> Codebook | None:
    """The levels of the codebook called ``name``, one of :data:`CODEBOOK_NAMES` or a text of levels (:func:`as_text`); None where
    every code is its own level."""
    if name == UNIFORM or not takes_codebook(bits):
        return None
    if name not in CODEBOOKS:
        return tuple(int(level) for level in name.split())
    with no_modes():  # it may be asked for while a graph is traced
        return to_bytes(CODEBOOKS[name](bits))


def is_codebook(name: object, bits: int | str) -> bool:
    """Whether ``name`` is one of :data:`CODEBOOK_NAMES`, or a text of ``2 ** bits`` ascending levels from 0 to 255."""
    if not isinstance(name, str) or name in CODEBOOK_NAMES:
        return isinstance(name, str)
    if not all(level.isdecimal() for level in name.split()) or bits == "auto" or not takes_codebook(int(bits)):
        return False
    levels = [int(level) for level in name.split()]
    return len(levels) == 2 ** int(bits) and levels == sorted(set(levels)) and levels[-1] < 2**MAX_BITS


def as_text(levels: Codebook) -> str:
    """``levels`` as a value of the option ``codebook``."""
    return " ".join(map(str, levels))


def to_bytes(levels: Tensor) -> Codebook:
    """``levels`` scaled to 127 and rounded, zero at 128. Where two would be the same, the outer one moves on."""
    rounded = [ZERO + int(level) for level in (levels / levels.abs().max() * (ZERO - 1)).round().tolist()]
    middle = len(rounded) // 2
    for i in range(middle + 1, len(rounded)):
        rounded[i] = max(rounded[i], rounded[i - 1] + 1)
    for i in reversed(range(middle)):
        rounded[i] = min(rounded[i], rounded[i + 1] - 1)
    last = len(rounded) - 1
    return tuple(min(max(level, i), 2**MAX_BITS - 1 - last + i) for i, level in enumerate(rounded))
