"""Codes and grids of another project as a packed weight: the codes are taken over, nothing is quantized again.

The storage format (docs/format.md) has a scale and an offset in float16 for each group, under one power of two. Where that holds
the grids of the file, the values are the same to the last bit. Two things may not fit:

* An offset that is a scale times an integer zero point: 11 bits times up to 8. Then the codes may take one bit more, shifted so
  that every group has its zero in the middle: such a symmetric grid has no offset, and is exact.
* A scale of more than 11 bits. It is rounded, and the error of the values is measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import NonFiniteWeightError
from kbit_inductor.kernels.layout import MAX_BITS, level_bits, midpoint, pack_codes, packed_width
from kbit_inductor.packing import PackedWeight
from kbit_inductor.quantizers import Levels

AT_ONCE = 1 << 17  # codes
LARGEST_EXPONENT = 14  # of a grid's numbers under the global scale: well inside float16


@dataclass(frozen=True)
class CodedWeight:
    """A weight ``[N, K]`` of codes, in the terms of the file that it comes from.

    A value is ``scale * (level - zero)`` or, with ``minimum``, ``scale * level + minimum``. A level is the code, or
    ``levels[code]``.

    Attributes:
        codes: gives the codes of some rows, uint8 ``[R, K]``, when asked: never those of all rows at once.
        rows: N.
        columns: K.
        bits: of a code.
        group_size: columns that share a scale.
        scale: float32 or float64 ``[N, G]``, ``G = ceil(K / group_size)``.
        zero: float64 ``[N, G]``, the level that means 0; None for the midpoint of all levels.
        minimum: float64 ``[N, G]``, the value of level 0; None where ``zero`` says it.
        codebook: the option of that name.
        order: int32 ``[K]``: ``codes`` and groups are of column ``order[j]`` of the weight in place ``j``; None for the same order.
        levels: float64 ``[2 ** bits]``, what the levels of ``codebook`` are in the file, where they are not whole numbers.
    """

    codes: Callable[[slice], Tensor]
    rows: int
    columns: int
    bits: int
    group_size: int
    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None
    codebook: str = "uniform"
    levels: Tensor | None = None
    order: Tensor | None = None

    @torch.no_grad()
    def packed(self, layer: str, *, exact: bool = True) -> PackedWeight:
        """The packed weight. Its ``error`` is 0 where it holds every value of the file.

        Args:
            layer: a name for messages.
            exact: let codes take one bit more where that makes the values exact.

        Raises:
            NonFiniteWeightError: a scale or zero point is NaN or infinite.
        """
        offset = self._offset()
        for numbers in (self.scale, offset):
            if numbers is not None and not bool(torch.isfinite(numbers).all()):
                raise NonFiniteWeightError(
                    f"layer {layer!r} has scales or zero points that are NaN or infinite; copy the file anew"
                )
        grid = _stored_grid(self.scale.double(), offset)
        if exact and grid.scale_is_exact and not grid.is_exact and self._can_widen():
            return self._widened().packed(layer)
        return self._pack(grid, offset)

    def _offset(self) -> Tensor | None:
        """The value of level 0, float64 ``[N, G]``; None for a symmetric grid."""
        if self.minimum is not None:
            return self.minimum.double()
        if self.zero is None or bool((self.zero == self._midpoint).all()):
            return None
        return -self.scale.double() * self.zero

    @property
    def _midpoint(self) -> float:
        return midpoint(level_bits(self.bits, self.codebook != "uniform"))

    def _can_widen(self) -> bool:
        zero, most = self.zero, 2**self.bits
        if zero is None or self.bits == MAX_BITS or self.codebook != "uniform":
            return False
        return bool(((zero == zero.round()) & (zero >= 0) & (zero <= most)).all())

    def _widened(self) -> CodedWeight:
        """The same values in codes of one bit more, of which the middle one means zero in every group."""
        assert self.zero is not None
        shift = (2**self.bits - self.zero).to(torch.uint8)
        group = torch.arange(self.columns) // self.group_size
        inner = self.codes
        return dataclasses.replace(self, codes=lambda part: inner(part) + shift[part][:, group], bits=self.bits + 1, zero=None)

    def _pack(self, grid: StoredGrid, offset: Tensor | None) -> PackedWeight:
        config = LayerConfig(self.bits, group_size=self.group_size, symmetric=offset is None, codebook=self.codebook)
        table = Levels(self.bits, config.levels()).table(torch.device("cpu"))
        zero = -self.scale.double() * self._midpoint if offset is None else offset
        rounded = grid.values(self._midpoint)
        planes = torch.empty(self.bits, self.rows, packed_width(self.columns), dtype=torch.uint8)
        lost = norm = 0.0
        for part in _parts(self.rows, self.columns):
            codes = self.codes(part)
            planes[:, part] = pack_codes(codes, self.bits)
            if not grid.is_exact or self.levels is not None:
                levels = codes if self.levels is None else self.levels[codes.int()]
                stored = codes if table is None else table[codes.int()]
                values = _decoded(levels, self.scale[part].double(), zero[part], self.group_size)
                lost += float((_decoded(stored, rounded[0][part], rounded[1][part], self.group_size) - values).square().sum())
                norm += float(values.square().sum())
        grids = (grid.scale, grid.offset, grid.global_scale, table)
        operands = (planes, *(tensor for tensor in grids if tensor is not None))
        return PackedWeight(operands, config, self.columns, lost / norm if norm else 0.0)


@dataclass(frozen=True)
class StoredGrid:
    """Grids as the storage format has them.

    Attributes:
        scale: float16 ``[N, G]``.
        offset: the same, or None.
        global_scale: float32 ``[1]``.
        scale_is_exact: whether the scales are those of the file.
        is_exact: whether the offsets are, too.
    """

    scale: Tensor
    offset: Tensor | None
    global_scale: Tensor
    scale_is_exact: bool
    is_exact: bool

    def values(self, midpoint: float) -> tuple[Tensor, Tensor]:
        """Step and value of level 0, float64 ``[N, G]``."""
        scale = self.scale.double() * self.global_scale
        return scale, -scale * midpoint if self.offset is None else self.offset.double() * self.global_scale


def _stored_grid(scale: Tensor, offset: Tensor | None) -> StoredGrid:
    """Under a global scale of 1 where that loses nothing, else under the power of two that puts the largest high in float16."""
    present = [numbers for numbers in (scale, offset) if numbers is not None and numbers.numel()]
    largest = max((float(numbers.abs().max()) for numbers in present), default=0.0)
    exponent = max(-126, min(126, math.frexp(largest)[1] - LARGEST_EXPONENT)) if largest else 0
    plain = _rounded(scale, offset, 1.0)
    return plain if plain.is_exact or exponent == 0 else _rounded(scale, offset, math.ldexp(1.0, exponent))


def _rounded(scale: Tensor, offset: Tensor | None, unit: float) -> StoredGrid:
    def half(numbers: Tensor) -> tuple[Tensor, bool]:
        rounded = (numbers / unit).half()
        return rounded, torch.equal(rounded.double() * unit, numbers)

    halves, same = half(scale)
    offsets, offsets_same = (None, True) if offset is None else half(offset)
    return StoredGrid(halves, offsets, torch.tensor([unit]), same, same and offsets_same)


def _decoded(levels: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    group = torch.arange(levels.size(1)) // group_size
    return levels.double() * scale[:, group] + zero[:, group]


def _parts(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, AT_ONCE // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
