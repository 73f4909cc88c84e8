"""What a product's kernel does with the sums before it stores them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
BLOCK = 1024


@dataclass(frozen=True)
class Epilogue:
    """``residual + activation(y) * factor``; of two gated matrices, ``residual + activation(first) * second``.

    Attributes:
        activation: one of :data:`ACTIVATIONS`; the empty one does nothing.
        gated: whether the products are those of a gate and of what it lets through. There is no ``factor`` then.
        factor, residual: of any floating dtype and the shape of the result, or None.
    """

    activation: str = ""
    gated: bool = False
    factor: Tensor | None = None
    residual: Tensor | None = None

    def flat(self, m: int, n: int) -> Epilogue:
        """The same with tensors ``[m, n]``, contiguous."""
        factor, residual = (None if each is None else each.reshape(m, n).contiguous() for each in (self.factor, self.residual))
        return Epilogue(self.activation, self.gated, factor, residual)


NOTHING = Epilogue()


def check_epilogue(epilogue: Epilogue) -> None:
    """Raise ValueError for an activation that there is not."""
    if epilogue.activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {epilogue.activation!r}; there are {', '.join(map(repr, ACTIVATIONS))}")


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
    out_ptr, sums, second, first_row, n, m, ROWS, N, M, bias_ptr, second_bias_ptr, factor_ptr, residual_ptr,
    ACTIVATION: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
):  # fmt: skip
    """``residual + activation(sums + bias) * factor`` at ``out[m, first_row + n]``, for float32 ``sums`` ``[n, m]``, ``n < ROWS``.

    With a ``second`` of such sums, that is the factor.
    """
    # What is loaded outside is never stored, so it may be anything.
    if EVEN_N and EVEN_M:
        mask = None
    elif EVEN_N:
        mask = (n >= 0)[:, None] & (m < M)[None, :]
    else:
        mask = (n < ROWS)[:, None] & (m < M)[None, :]
    where = m.to(tl.int64)[None, :] * N + (first_row + n)[:, None]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=None if EVEN_N else n < ROWS).to(tl.float32)[:, None]
    sums = activate(sums, ACTIVATION)
    if second is not None:
        if second_bias_ptr is not None:
            second += tl.load(second_bias_ptr + n, mask=None if EVEN_N else n < ROWS).to(tl.float32)[:, None]
        sums *= second
    if factor_ptr is not None:
        sums *= tl.load(factor_ptr + where, mask=mask).to(tl.float32)
    if residual_ptr is not None:
        sums += tl.load(residual_ptr + where, mask=mask).to(tl.float32)
    tl.store(out_ptr + where, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def epilogue_kernel(
    y_ptr, factor_ptr, residual_ptr, out_ptr, size, N, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of ``out`` ``[M, N]`` from a product ``y`` ``[M, N]``, or of two gated ones side by side."""
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = where < size
    first = where + where // N * N if GATED else where
    y = activate(tl.load(y_ptr + first, mask=mask).to(tl.float32), ACTIVATION)
    if GATED:
        y *= tl.load(y_ptr + first + N, mask=mask).to(tl.float32)
    if factor_ptr is not None:
        y *= tl.load(factor_ptr + where, mask=mask).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + where, mask=mask).to(tl.float32)
    tl.store(out_ptr + where, y.to(out_ptr.dtype.element_ty), mask=mask)


def apply_epilogue(y: Tensor, epilogue: Epilogue) -> Tensor:
    """``epilogue`` of a product ``y`` ``[..., N]`` that is stored already, with its bias; gated ones are side by side."""
    if epilogue == NOTHING:
        return y
    n = y.size(-1) // (2 if epilogue.gated else 1)
    out = torch.empty(*y.shape[:-1], n, dtype=y.dtype, device=y.device)
    if out.numel():
        behind = epilogue.flat(out.numel() // n, n)
        with torch.cuda.device_of(y):  # Triton launches on the current device, whatever device the tensors are on
            epilogue_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                y, behind.factor, behind.residual, out, out.numel(), n, behind.activation, behind.gated, BLOCK
            )
    return out
