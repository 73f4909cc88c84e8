"""What a product's kernel does with the sums before it stores them."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")


@triton.jit
def tanh(x):
    """Of float32, exact to a few units in the last place: where ``2 sigmoid(2 x) - 1`` would cancel, by its series."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.1, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of :data:`ACTIVATIONS` of float32 ``x``."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # keeps NaN
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    return x


@triton.jit
def store_result(
    out_ptr,
    sums,
    n,
    m,
    N,
    M,
    bias_ptr,
    factor_ptr,
    residual_ptr,
    ACTIVATION: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_M: tl.constexpr,
):
    """``residual + activation(sums + bias) * factor`` at ``out[m, n]``, for ``sums`` ``[n, m]`` in float32."""
    # What is loaded outside is never stored, so it may be anything.
    if EVEN_N and EVEN_M:
        mask = None
    elif EVEN_N:
        mask = (n >= 0)[:, None] & (m < M)[None, :]
    else:
        mask = (n < N)[:, None] & (m < M)[None, :]
    where = m.to(tl.int64)[None, :] * N + n[:, None]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=None if EVEN_N else n < N).to(tl.float32)[:, None]
    sums = activate(sums, ACTIVATION)
    if factor_ptr is not None:
        sums *= tl.load(factor_ptr + where, mask=mask).to(tl.float32)
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + where, mask=mask).to(tl.float32)
    tl.store(out_ptr + where, sums.to(out_ptr.dtype.element_ty), mask=mask)
