"""What the Triton kernels share: a tile of the packed weight, back as float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_weight_tile(
    planes_ptr,
    scale_ptr,
    offset_ptr,
    rows,
    row_mask,
    first_column,
    columns,
    plane_stride,
    row_stride,
    BITS: tl.constexpr,
    MIDPOINT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``scale * code + offset`` of rows ``rows`` and ``BLOCK_K`` columns from ``first_column``, a multiple of 8.

    Returns float32 ``[len(rows), BLOCK_K]``, without ``global_scale``. ``scale * code`` is exact in float32, so each
    value is rounded once and equals the reference bit for bit, fused multiply-add or not. Values past ``columns`` are
    finite for finite operands but meaningless; rows outside ``row_mask`` are zero and never read.
    """
    rows = rows.to(tl.int64)[:, None]  # a plane may exceed 2 GiB
    row_mask = row_mask[:, None]
    byte = first_column // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    lane = tl.arange(0, 8)[None, None, :]

    byte_mask = row_mask & (byte * 8 < columns)
    byte_ptr = planes_ptr + rows * row_stride + byte
    codes = tl.zeros([rows.shape[0], BLOCK_K // 8, 8], tl.int32)
    for _ in tl.static_range(BITS):
        packed = tl.load(byte_ptr, mask=byte_mask, other=0).to(tl.int32)
        codes = codes * 2 + ((packed[:, :, None] >> lane) & 1)
        byte_ptr += plane_stride

    groups = tl.cdiv(columns, GROUP_SIZE)
    # A group of whole bytes: one load serves the 8 columns of each. Triton drops the untaken branch of a statement only.
    if GROUP_SIZE % 8 == 0:  # noqa: SIM108
        group = (byte // (GROUP_SIZE // 8))[:, :, None]
    else:
        group = (byte[:, :, None] * 8 + lane) // GROUP_SIZE
    group_mask = row_mask[:, :, None] & (group < groups)
    group_index = rows[:, :, None] * groups + group
    scale = tl.load(scale_ptr + group_index, mask=group_mask, other=0.0).to(tl.float32)
    if offset_ptr is None:
        offset = -scale * MIDPOINT
    else:
        offset = tl.load(offset_ptr + group_index, mask=group_mask, other=0.0).to(tl.float32)
    return tl.reshape(scale * codes.to(tl.float32) + offset, [rows.shape[0], BLOCK_K])
