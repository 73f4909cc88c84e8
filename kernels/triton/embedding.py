"""Rows of a packed table, gathered and dequantized in one pass (layout: :mod:`kbit_inductor.kernels.layout`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.layout import midpoint
from kbit_inductor.kernels.triton.tiles import load_weight_tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK_ROWS = 4
BLOCK_COLUMNS = 256


@triton.jit(do_not_specialize=["count"])  # one compiled kernel for every number of indices
def embedding_kernel(
    indices_ptr,
    planes_ptr,
    scale_ptr,
    offset_ptr,
    global_scale_ptr,
    out_ptr,
    count,
    rows,
    columns,
    plane_stride,
    row_stride,
    BITS: tl.constexpr,
    MIDPOINT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One ``[BLOCK_M, BLOCK_K]`` tile of ``out``, float16/bfloat16/float32 ``[count, columns]``, contiguous."""
    tiles_k = tl.cdiv(columns, BLOCK_K)
    start = (tl.program_id(0) % tiles_k) * BLOCK_K
    m = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = start + tl.arange(0, BLOCK_K)

    index = tl.load(indices_ptr + m, mask=m < count, other=0)
    valid = (index >= 0) & (index < rows)
    weight = load_weight_tile(
        planes_ptr, scale_ptr, offset_ptr, index, valid, start, columns, plane_stride, row_stride,
        BITS, MIDPOINT, GROUP_SIZE, BLOCK_K,
    )  # fmt: skip
    weight = tl.where(valid[:, None], weight * tl.load(global_scale_ptr), float("nan"))
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * columns + k[None, :]
    tl.store(out_ptrs, weight.to(out_ptr.dtype.element_ty), mask=(m < count)[:, None] & (k < columns)[None, :])


def launch_arguments(
    indices: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    group_size: int,
    out: Tensor,
) -> dict[str, object]:
    """Arguments of :func:`embedding_kernel`, by name; ``indices`` is ``[count]`` and ``out`` ``[count, K]``."""
    bits, rows, _ = planes.shape
    return {
        "indices_ptr": indices,
        "planes_ptr": planes,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "global_scale_ptr": global_scale,
        "out_ptr": out,
        "count": indices.numel(),
        "rows": rows,
        "columns": out.size(1),
        "plane_stride": planes.stride(0),
        "row_stride": planes.stride(1),
        "BITS": bits,
        "MIDPOINT": midpoint(bits),
        "GROUP_SIZE": group_size,
        "BLOCK_M": BLOCK_ROWS,
        "BLOCK_K": BLOCK_COLUMNS,
    }


def embedding(
    indices: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    embedding_dim: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``indices`` (int32 or int64, ``[...]``) of the packed table as ``[..., embedding_dim]`` of ``dtype``.

    The values equal the reference's bit for bit. A kernel cannot raise: an index outside the table gives a row of NaN
    and reads nothing.

    Raises:
        TypeError: ``dtype`` is not float16, bfloat16 or float32.
    """
    if dtype not in DTYPES:
        raise TypeError(f"the Triton embedding kernel gives float16, bfloat16 or float32, not {dtype}")
    out = torch.empty(*indices.shape, embedding_dim, dtype=dtype, device=planes.device)
    if out.numel() == 0:
        return out
    flat = indices.reshape(-1).contiguous()
    arguments = launch_arguments(flat, planes, scale, offset, global_scale, group_size, out.view(flat.numel(), embedding_dim))
    grid = (triton.cdiv(flat.numel(), BLOCK_ROWS) * triton.cdiv(embedding_dim, BLOCK_COLUMNS),)
    with torch.cuda.device_of(planes):  # Triton launches on the current device, whatever device the tensors are on
        embedding_kernel[grid](**arguments)
    return out
