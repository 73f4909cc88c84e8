"""The RMS norm in front of a product (Zhang and Sennrich, 2019), ``x * inverse_rms(x) * weight``.

The kernel that rounds activations computes it of what it reads. A product of activations that are not rounded does not: in the loop
that decodes a word it would take two instructions for each weight as well, more than to unpack and to multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a step


@dataclass(frozen=True)
class Norm:
    """``x * rsqrt(mean(x ** 2) + eps) * weight`` over the last dimension; ``weight`` is ``[K]``, of the dtype of ``x``."""

    weight: Tensor
    eps: float


@triton.jit
def inverse_rms(row_ptr, K, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """``1 / sqrt(mean(x ** 2) + EPS)`` of the ``K`` columns at ``row_ptr``, float32."""
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        squares += x * x
    return 1 / tl.sqrt(tl.sum(squares, 0) / K + EPS)
