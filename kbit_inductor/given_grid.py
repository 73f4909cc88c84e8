"""A weight whose grid the graph says, ``scale * (code - zero)``: its codes are taken over, nothing is quantized again.

The codes are found from the values, which are multiples of the scale, so it does not matter how the graph spells them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.config import LayerConfig
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.packing import PackedWeight


@dataclass(frozen=True)
class GivenGrid:
    """The grid of a matrix ``[N, K]``.

    Attributes:
        scale: a number, or the position among the graph's inputs of one for each row or group, in any shape of N * G elements.
        zero: the code that means 0, given alike.
        scale_is_input: whether ``scale`` is a position.
        zero_is_input: whether ``zero`` is one.
        low: the least code.
        high: the largest.
        group_size: columns that share a scale; -1 for a row.
    """

    scale: float
    zero: float
    scale_is_input: bool
    zero_is_input: bool
    low: int
    high: int
    group_size: int = -1

    @property
    def bits(self) -> int:
        """Of a code."""
        return max((self.high - self.low).bit_length(), 1)

    def pack(self, matrix: Tensor, arguments: Sequence[Any], config: LayerConfig, layer: str, layout: str) -> PackedWeight | None:
        """The packed form of ``matrix``, which ``config`` describes; None where the rows of the grid are not those of the matrix.

        It holds every value if the scales and zeros fit float16 under a common power of two; else they are rounded to that, and
        its ``error`` says what that costs.

        Raises:
            NonFiniteWeightError: a scale is NaN or infinite.
        """
        if matrix.dim() != 2:
            return None
        rows, columns = matrix.shape
        group_size = max(columns, 1) if self.group_size == -1 else self.group_size
        groups = -(-columns // group_size)
        grids = []
        for number, is_input in ((self.scale, self.scale_is_input), (self.zero, self.zero_is_input)):
            told: Tensor = arguments[int(number)].detach() if is_input else torch.tensor([number], dtype=torch.float32)
            if told.numel() not in (1, rows * groups):
                return None
            grids.append(told.to("cpu", torch.float64).reshape(-1, groups if told.numel() > 1 else 1).expand(rows, groups))
        scale, zero = grids
        # Of signed codes without the least one, -127 to 127, level 0 is that one: half of all levels times a scale fits float16.
        half = 2 ** (self.bits - 1)
        lowest = -half if -half <= self.low and self.high < half else self.low
        group = torch.arange(columns) // group_size

        def codes(part: slice) -> Tensor:
            steps = matrix[part].to("cpu", torch.float64) / scale[part][:, group]
            found = (steps.nan_to_num(0.0) + zero[part][:, group]).round().clamp(self.low, self.high)
            return (found - lowest).to(torch.uint8)

        minimum = scale * (lowest - zero)
        coded = CodedWeight(codes, rows, columns, self.bits, group_size, scale, minimum=minimum)
        packed = coded.packed(layer, exact=False)
        operands = tuple(operand.to(matrix.device) for operand in packed.operands)
        return dataclasses.replace(packed, operands=operands, config=config).laid_out(layout)
