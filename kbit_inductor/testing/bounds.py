"""How far a kernel may be from what it is defined to compute, from the number of terms, the dtypes and the step of rounding.

The exact result is in float64 on the kernel's own operands: activations rounded as the layout's kernels round them, weights as the
codes stand for them. The bound is the a-priori one of a float32 sum (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
section 3.1), then one rounding to the dtype of the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import TILED_LAYOUTS, unpack_codes
from kbit_inductor.packing import PackedWeight, plane_operands

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclass(frozen=True)
class Grid:
    """A packed matrix in float64.

    Attributes:
        weight: what its codes stand for, ``[N, K]``.
        magnitude: what a kernel adds up for it without the cancellation between ``scale * code`` and ``offset``, ``[N, K]``.
        group_size: columns per scale.
    """

    weight: Tensor
    magnitude: Tensor
    group_size: int

    @classmethod
    def of(cls, packed: PackedWeight) -> Grid:
        """The grid of a packed matrix."""
        if packed.layout in TILED_LAYOUTS:
            codes, scale, zero, global_scale, levels = torch.ops.kbit.untile_cpu(packed.operands[0])
            offset, codebook = None if packed.config.symmetric else zero, levels if levels.numel() else None
        else:
            operands = packed.laid_out("planes").operands
            planes, scale, offset, global_scale, codebook = plane_operands(operands, packed.config)
            codes = unpack_codes(planes, packed.columns)
        group_size = packed.config.group_columns(packed.columns)
        group = torch.arange(packed.columns) // group_size
        values = (codes if codebook is None else codebook[codes.int()]).double()
        step = scale.double()[:, group].abs()
        zero = step * 2.0 ** (8 if codebook is not None else packed.config.bits) if offset is None else offset.double()[:, group]
        magnitude = (values * step + zero.abs()) * global_scale.double()
        return cls(packed.coded.dequantize(torch.float64), magnitude, group_size)


def product(x: Tensor, grid: Grid, bias: Tensor | None, activation_bits: int | None) -> tuple[Tensor, Tensor]:
    """``x @ W.T + bias`` in float64, and the bound for each of its elements.

    Args:
        x: ``[…, K]``.
        grid: of the weight.
        bias: ``[N]`` or None.
        activation_bits: what kernels of the CPU round ``x`` to; None for kernels that do not.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), grid.weight.shape[1])
    wide = rows.double() if activation_bits is None else reference.round_activations(rows, grid.group_size, activation_bits)
    exact, magnitude = wide @ grid.weight.t(), wide.abs() @ grid.magnitude.t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    unit = UNIT[reference.sum_dtype(x)]
    summed = 2 * (grid.weight.shape[1] + 8) * unit * magnitude
    shape = (*x.shape[:-1], grid.weight.shape[0])
    return exact.view(shape), rounded(exact, summed, x.dtype).view(shape)


def rounded(exact: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """``bound``, and one rounding of the result to ``dtype``."""
    info = torch.finfo(dtype)
    return bound + info.eps / 2 * (exact.abs() + bound) + info.smallest_normal * info.eps
