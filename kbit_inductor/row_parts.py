"""A packed matrix some rows at a time: the codes of a whole one, as bytes, would be up to eight times the weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 1 << 18  # codes
BLOCK_ROWS = 16  # of the CPU kernels' layouts, which are written whole blocks at a time


class Rows(NamedTuple):
    """Some rows of a matrix.

    Attributes:
        codes: uint8 ``[R, K]``.
        scale: float16 ``[R, G]``; of a cascade ``[k, R, G]``.
        offset: the same, or None.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def of(self, part: slice) -> Rows:
        """The rows ``part`` of these."""
        offset = None if self.offset is None else self.offset[..., part, :]
        return Rows(self.codes[part], self.scale[..., part, :], offset)


def parts(rows: int, columns: int) -> list[slice]:
    """All rows in turn, about :data:`AT_ONCE` codes and whole blocks at a time; one part, and it empty, where there are none."""
    step = max(1, AT_ONCE // (max(columns, 1) * BLOCK_ROWS)) * BLOCK_ROWS
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def joined(pieces: Iterable[tuple[slice, tuple[Tensor, ...]]], specs: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Arrays of ``specs``, filled with ``pieces`` of them: each has the rows of its slice, on the one axis where it is shorter.

    What has no axis of rows is taken from the first piece.
    """
    whole: list[Tensor] = []
    for part, piece in pieces:
        if not whole:
            whole = [one.new_empty(shape) for one, (shape, _) in zip(piece, specs, strict=True)]
        for target, one in zip(whole, piece, strict=True):
            axis = next((axis for axis in range(one.dim()) if one.size(axis) != target.size(axis)), None)
            (target if axis is None else target.narrow(axis, part.start, part.stop - part.start)).copy_(one)
    return whole
