"""The side term of a packed weight: what floats add to the product of its codes.

``side(x) = [x @ down.T, x[columns]] @ up.T``, and ``shift`` is added to the bias. ``down`` projects x to few numbers, whose part of
``up`` is a low-rank approximation of what the codes have lost; ``columns`` are inputs whose weights are in ``up`` as they are. So
there is one small product in float, whatever the term consists of, and its result is what the product of codes is added to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from kbit_inductor.quantizers import Statistics
from kbit_inductor.quantizers.compensation import float_columns, low_rank, mean_output, root_of
from kbit_inductor.quantizers.grid import global_scale_of

if TYPE_CHECKING:
    from kbit_inductor.config import LayerConfig

PREFIX = "side_"
Call = Callable[..., Any]
"""Calls a function on its arguments, or adds such a call to a graph."""


@dataclass(frozen=True)
class Side:
    """The floats of a matrix ``[N, K]``, all but ``columns`` of its dtype; None for what there is not.

    Attributes:
        down: ``[r, K]``.
        columns: int32 ``[c]``, ascending.
        up: ``[N, r + c]``, what ``down`` gives first.
        shift: ``[N]``, what the outputs lack on average.
    """

    down: Any = None
    columns: Any = None
    up: Any = None
    shift: Any = None

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Side | None:
        """That of :func:`side_specs`' names to tensors, or nodes of a graph; None where there is no part."""
        return cls(**{name.removeprefix(PREFIX): part for name, part in parts.items()}) if parts else None

    @property
    def parts(self) -> dict[str, Any]:
        """What there is, by the names and in the order of the storage format."""
        named = ((PREFIX + field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: part for name, part in named if part is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def matrix(self, columns: int, dtype: torch.dtype) -> Tensor:
        """The matrix ``[N, columns]`` that the term multiplies by, 0 where there is none."""
        if self.up is None:
            return torch.zeros((), dtype=dtype)
        up: Tensor = self.up.to(dtype)
        rank = 0 if self.down is None else self.down.size(0)
        made: Tensor = up.new_zeros(up.size(0), columns) if self.down is None else up[:, :rank] @ self.down.to(dtype)
        return made if self.columns is None else made.index_add(1, self.columns.to(torch.int64), up[:, rank:])


def with_shift(call: Call, bias: Any, shift: Any) -> Any:
    """What is to be added to each row in place of ``bias``; either may be None."""
    if bias is None or shift is None:
        return bias if shift is None else shift
    return call(torch.add, bias, shift)


def with_term(call: Call, product: Any, x: Any, down: Any, columns: Any, up: Any) -> Any:
    """``product + side(x)``; the parts are those of :class:`Side`, and what there is of them is multiplied by."""
    if up is None:
        return product
    inner = [] if down is None else [call(functional.linear, x, down)]
    if columns is not None:
        inner.append(call(torch.index_select, x, -1, columns))
    term = call(functional.linear, inner[0] if len(inner) == 1 else call(torch.cat, inner, -1), up)
    return call(torch.add, product, term)


SIDE = tuple(PREFIX + field.name for field in dataclasses.fields(Side))
"""Names of the parts in the storage format."""


def side_specs(rows: int, columns: int, config: LayerConfig, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part of the side term of a matrix of ``dtype``, known before any value is."""
    rank = min(config.low_rank, rows, columns)
    count = min(columns, math.ceil(config.outliers * columns - 1e-9))  # the next number to the share
    inner = rank + count if rows else 0
    specs = {
        "down": ((rank, columns), dtype) if rank else None,
        "columns": ((count,), torch.int32) if inner and count else None,
        "up": ((rows, inner), dtype) if inner else None,
        "shift": ((rows,), dtype) if config.bias_correction and rows else None,
    }
    return {PREFIX + name: spec for name, spec in specs.items() if spec is not None}


def find_side(
    lost: Tensor, columns: Tensor | None, config: LayerConfig, dtype: torch.dtype, statistics: Statistics | None
) -> Side | None:
    """The side term for a matrix whose codes have lost ``lost``, float32 ``[N, K]``.

    Args:
        lost: the matrix less what its codes stand for.
        columns: which of its columns stay in float, int32.
        config: says what the term consists of.
        dtype: of the matrix.
        statistics: of its inputs.
    """
    rows, width = lost.shape
    specs = side_specs(rows, width, config, dtype)
    down, up, left = None, [], lost
    if columns is not None:
        kept = float_columns(lost, columns, statistics)
        up.append(kept)
        left = lost.index_add(1, columns, kept, alpha=-1)
    if "side_down" in specs:
        wide, down = _low_rank(left, min(config.low_rank, rows, width), statistics)
        up.insert(0, wide)
    side = Side(None if down is None else down.to(dtype), columns, torch.cat(up, 1).to(dtype) if up else None)
    if "side_shift" in specs:
        left = lost - side.matrix(width, lost.dtype)
        side = dataclasses.replace(side, shift=mean_output(left, statistics).to(dtype))
    return side if specs else None


def _low_rank(lost: Tensor, rank: int, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
    """Both factors, of about the same magnitude; ``lost`` is brought near 1, as squares of tiny and huge values are no floats."""
    exponent = int(torch.frexp(global_scale_of(lost))[1]) + 13
    up, down = low_rank(torch.ldexp(lost, torch.tensor(-exponent)), rank, root_of(statistics))
    half = exponent // 2
    return torch.ldexp(up, torch.tensor(half)), torch.ldexp(down, torch.tensor(exponent - half))
