"""``y = x @ W.T + bias`` on packed weights as they are stored (layout: :mod:`kbit_inductor.kernels.layout`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.layout import midpoint
from kbit_inductor.kernels.triton.tiles import load_weight_tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Config:
    """How the output is cut: a program computes ``block_m`` rows by ``block_n`` columns, ``block_k`` inputs a step.

    Every block is a power of two, ``block_k`` at least 16. With ``block_m == 1`` a program multiplies and adds in
    float32; above that it uses ``tl.dot``, for which ``block_m`` and ``block_n`` are at least 16.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 2


def default_config(rows: int, dtype: torch.dtype) -> Config:
    """The tile sizes for ``rows`` rows of ``x``. Chosen so that no kernel spills, not by measurement on a device."""
    # Triton's interpreter multiplies the bit patterns of bfloat16 (triton-lang/triton#11584), so there is no dot in it.
    if rows <= 4 or (dtype == torch.bfloat16 and triton.knobs.runtime.interpret):
        return Config(block_m=1, block_n=16, block_k=128)
    # A float32 product has no tensor cores to go to: its operands are held in registers, which bounds the tile.
    if dtype == torch.float32:
        return Config(block_m=16, block_n=32, block_k=32)
    if rows <= 32:
        return Config(block_m=16, block_n=32, block_k=64)
    return Config(block_m=64, block_n=64, block_k=64, num_warps=8)


@triton.jit(do_not_specialize=["M"])  # one compiled kernel for every number of rows of a range
def linear_kernel(
    x_ptr,
    planes_ptr,
    scale_ptr,
    offset_ptr,
    global_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    x_row_stride,
    x_column_stride,
    plane_stride,
    row_stride,
    BITS: tl.constexpr,
    MIDPOINT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One ``[BLOCK_M, BLOCK_N]`` tile of ``out``, float16/bfloat16/float32 ``[M, N]``, contiguous."""
    # Consecutive programs share a tile of the weight, the larger operand, so that it is read from memory once.
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_row_stride

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_rows + k.to(tl.int64) * x_column_stride, mask=(m < M)[:, None] & (k < K), other=0.0)
        weight = load_weight_tile(
            planes_ptr, scale_ptr, offset_ptr, n, n < N, start, K, plane_stride, row_stride,
            BITS, MIDPOINT, GROUP_SIZE, BLOCK_K,
        )  # fmt: skip
        if BLOCK_M == 1:
            acc += tl.sum(x.to(tl.float32) * weight, axis=1)[None, :]
        else:
            acc = tl.dot(x, tl.trans(weight.to(x.dtype)), acc, input_precision="ieee")

    out = acc * tl.load(global_scale_ptr)  # a power of two: exact here as it would be on the weight
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def launch_arguments(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    out: Tensor,
    config: Config,
) -> dict[str, object]:
    """Arguments of :func:`linear_kernel`, by name, for a launch and for a compile ahead of time alike.

    ``x`` is ``[M, K]``, ``out`` ``[M, N]``; neither they nor the packed operands are read, so meta tensors do.
    """
    bits, columns, _ = planes.shape
    return {
        "x_ptr": x,
        "planes_ptr": planes,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "global_scale_ptr": global_scale,
        "bias_ptr": bias,
        "out_ptr": out,
        "M": x.size(0),
        "N": columns,
        "K": x.size(1),
        "x_row_stride": x.stride(0),
        "x_column_stride": x.stride(1),
        "plane_stride": planes.stride(0),
        "row_stride": planes.stride(1),
        "BITS": bits,
        "MIDPOINT": midpoint(bits),
        "GROUP_SIZE": group_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def linear(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    config: Config | None = None,
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``[..., K]`` of any strides; the result ``[..., N]`` has the dtype of ``x``.

    Args:
        x: float16, bfloat16 or float32.
        planes, scale, offset, global_scale, group_size: the packed weight, each tensor contiguous.
        bias: ``[N]`` of any floating dtype, or None.
        config: tile sizes; by default those of :func:`default_config`.

    Sums are float32 and rounded once, at the end, so with ``u(t)`` the unit roundoff of dtype ``t`` (half the distance
    from 1 to the next number) and ``a = sum_k |x[k] w[n, k]|``::

        |error| <= u(x.dtype) |y| + (u_w + (K + 2) u(float32)) a + u(float32) |bias|        to first order

    where ``u_w`` is ``u(float32)`` for float32 ``x`` or ``block_m == 1``, by default up to 4 rows. Above that it is
    ``u(x.dtype)``, since tensor cores take the weight in the dtype of ``x``, as they do in a float model. What is
    rounded there is the weight before ``global_scale``: in float16 a value beyond 65504 becomes infinite and one below
    6e-5 loses up to 2**-25. Tensor cores truncate where they add, which doubles ``u(float32)``.

    Raises:
        TypeError: ``x`` is of another dtype.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"the Triton linear kernel takes float16, bfloat16 or float32, not {x.dtype}")
    columns, rows = planes.size(1), math.prod(x.shape[:-1])
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = config or default_config(rows, x.dtype)
    flat = x.reshape(rows, x.size(-1))
    arguments = launch_arguments(flat, planes, scale, offset, global_scale, bias, group_size, out.view(rows, columns), config)
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever device the tensors are on
        linear_kernel[grid](**arguments)
    return out
