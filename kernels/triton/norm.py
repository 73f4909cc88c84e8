"""The RMS norm in front of a product (Zhang and Sennrich, 2019): a kernel for many rows, and what products of few compute of it.

``rms_norm(x) = x * inverse_rms(x) * weight``. The first factor is the same for a whole row, so it may come after the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


@triton.jit
def inverse_rms_in_two(x_ptr, M, K, x_row_stride, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """:func:`inverse_rms` of each of the ``M`` rows of ``x``, as a power of two and the rest, two ``[BLOCK_M]`` of float32.

    A row times the power of two is exact and of the size of a normed one, so that a float16 does not overflow.
    """
    row = tl.arange(0, BLOCK_M)
    inverse = tl.zeros([BLOCK_M], tl.float32)
    for m in range(M):
        inverse = tl.where(row == m, inverse_rms(x_ptr, K, EPS, BLOCK), inverse)
        x_ptr += x_row_stride
    power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.minimum(power, 32768.0)  # of float16
    return power, tl.where(power > 0, inverse / power, 0.0)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, K, x_row_stride, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """One row of ``out`` ``[M, K]``, contiguous."""
    m = tl.program_id(0).to(tl.int64)
    inverse = inverse_rms(x_ptr + m * x_row_stride, K, EPS, BLOCK)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + m * x_row_stride + k, mask=k < K, other=0.0).to(tl.float32)
        normed = x * inverse * tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + m * K + k, normed.to(out_ptr.dtype.element_ty), mask=k < K)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """The norm of the rows of ``x`` ``[M, K]``, columns side by side, in float32 and rounded once to the dtype of ``x``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever device the tensors are on
            rms_norm_kernel[(x.size(0),)](x, norm.weight, out, x.size(1), x.stride(0), norm.eps, BLOCK)
    return out
