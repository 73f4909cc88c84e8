"""Plain PyTorch forms of the operators: their definition, their default and the oracle of every kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import FP8, level_bits, midpoint, unpack_codes


def dequantize(
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    columns: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    codebook: Tensor | None = None,
) -> Tensor:
    """The weight ``[N, columns]`` that packed operands stand for (layout: :mod:`kbit_inductor.kernels.layout`).

    The arithmetic is float32, or float64 when ``dtype`` is; the result is then rounded to ``dtype``.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_codes(planes, columns)
    levels = (codes if codebook is None else codebook[codes.int()]).to(compute)
    group = torch.arange(columns, device=planes.device) // group_size
    step = scale.to(compute)[:, group]
    middle = midpoint(level_bits(planes.size(0), codebook is not None))
    zero = -step * middle if offset is None else offset.to(compute)[:, group]
    return ((levels * step + zero) * global_scale.to(compute)).to(dtype)


def linear(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    codebook: Tensor | None = None,
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` of shape ``[..., K]`` and any floating dtype; the result ``[..., N]`` has the dtype of ``x``.

    Sums are float32 (float64 for float64 ``x``) and rounded once, at the end.
    """
    compute = sum_dtype(x)
    weight = dequantize(planes, scale, offset, global_scale, x.size(-1), group_size, compute, codebook)
    out = x.to(compute) @ weight.t()
    if bias is not None:
        out = out + bias.to(compute)
    return out.to(x.dtype)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with ``x`` are summed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear_by_row(x: Tensor, chosen: Tensor, count: int, rows: int, matrix: Callable[[int], Tensor]) -> Tensor:
    """``x[t] @ matrix(chosen[t]).T`` for ``x`` ``[T, K]`` and int64 ``chosen`` ``[T]``; zeros where no choice is below ``count``.

    ``matrix`` gives ``[rows, K]`` in :func:`sum_dtype`; the result ``[T, rows]`` has the dtype of ``x``.
    """
    out = x.new_zeros((x.size(0), rows))
    for i in chosen.unique().tolist():
        if i < count:
            mine = chosen == i
            out[mine] = (x[mine].to(sum_dtype(x)) @ matrix(i).t()).to(x.dtype)
    return out


def embedding(
    indices: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    """Rows ``indices`` (int32 or int64, any shape ``[...]``) of the packed table as ``[..., embedding_dim]`` of ``dtype``.

    Raises:
        IndexError: an index is negative or not below the number of rows (on CPU; device tensors are not read).
    """
    flat = indices.reshape(-1)
    rows = planes.size(1)
    if flat.device.type == "cpu" and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < rows:
        raise IndexError(f"index out of range in an embedding of {rows} rows")
    picked = dequantize(
        planes.index_select(1, flat),
        scale.index_select(0, flat),
        None if offset is None else offset.index_select(0, flat),
        global_scale,
        embedding_dim,
        group_size,
        dtype,
        codebook,
    )
    return picked.view(*indices.shape, embedding_dim)


LARGEST_FP8 = 448.0
SEGMENT = 128  # columns that share a scale of rounded activations, at most


def round_activations(x: Tensor, group_size: int, bits: int, nudge: float = 0.0) -> Tensor:
    """``x`` ``[M, K]`` as the CPU kernels read it under ``activation_bits=bits``, in float64.

    Each row is cut into segments of at most 128 columns that straddle no group. At 2 to 8 bits a segment's values become integers
    of magnitude below ``2 ** (bits - 1)`` times one step; at 1 bit, plus or minus their mean magnitude. 16 bits mean a block
    floating point: 24 bits for float32 and 16 for the other dtypes, with a power of two for the step. ``FP8`` means 8-bit floats
    times one step for a whole row, whose largest value becomes 448, the largest of them.

    With a ``nudge`` every value is larger by so much, relatively, when it is rounded, and steps are as they were: with a small one
    of either sign it shows which values may be rounded either way.
    """
    if bits == FP8:
        step = x.float().abs().amax(1, keepdim=True) / LARGEST_FP8 if x.size(1) else x.new_zeros(x.size(0), 1)
        inverse = torch.where(step > 0, 1 / step, 0.0)
        return (x.float() * inverse * (1 + nudge)).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).double() * step.double()
    rounded = torch.zeros(x.shape, dtype=torch.float64)
    for group in range(0, x.size(1), group_size):
        end = min(group + group_size, x.size(1))
        for begin in range(group, end, SEGMENT):
            columns = slice(begin, min(begin + SEGMENT, end))
            rounded[:, columns] = _round_segment(x[:, columns].float(), bits, x.dtype, nudge)
    return rounded


def _round_segment(values: Tensor, bits: int, dtype: torch.dtype, nudge: float) -> Tensor:
    if bits == 1:
        return torch.where(values < 0, -1, 1).double() * values.abs().mean(1, keepdim=True).double()
    kept = bits if bits < 16 else 24 if dtype == torch.float32 else 16
    largest_code = 2.0 ** (kept - 1) - 1 if kept <= 8 else 127 * 2.0 ** (kept - 8)
    step = values.abs().amax(1, keepdim=True) / largest_code
    if kept > 8:
        step = torch.ldexp(torch.ones_like(step), torch.frexp(step).exponent)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    return torch.round(values * inverse * (1 + nudge)).double() * step.double()
