"""``residual + activation(x @ W.T + bias) * factor`` on words (layout: :mod:`kbit_inductor.kernels.words`)."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.triton.config import Config, default_config
from kbit_inductor.kernels.triton.epilogue import ACTIVATIONS, store_result
from kbit_inductor.kernels.triton.launch import NOT_ROUNDED, activations, check_activations, device_of, takes_ptx, tile_arguments
from kbit_inductor.kernels.triton.quantize import Activations
from kbit_inductor.kernels.triton.tile import tile_sums
from kbit_inductor.kernels.words import WordLayout


@triton.jit(do_not_specialize=["M"])  # one compiled kernel for every number of rows of a range
def linear_kernel(
    x_ptr, words_ptr, scale_ptr, offset_ptr, global_scale_ptr, codebook_ptr,
    bias_ptr, factor_ptr, residual_ptr, step_ptr, sums_ptr, partial_ptr, arrivals_ptr, out_ptr,
    M, N, K, x_row_stride, row_words, groups, steps,
    BITS: tl.constexpr, MIDPOINT: tl.constexpr, GROUP_SIZE: tl.constexpr, PIECE: tl.constexpr, GROUP_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, STEPS: tl.constexpr, SPAN: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_N, BLOCK_M]`` tile of the transposed ``out``, float16/bfloat16/float32 ``[M, N]``, contiguous.

    With ``SPLIT_K`` programs to a tile, each computes a share of the steps, and the last to arrive adds the shares up in order.
    """
    # Consecutive programs share a tile of the weight, the larger operand, so that it is read from memory once.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    share = tl.program_id(1)
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n if EVEN_N else tl.minimum(n, N - 1)
    acc = tile_sums(
        x_ptr, words_ptr, scale_ptr, offset_ptr, codebook_ptr, step_ptr, sums_ptr, m if EVEN_M else tl.minimum(m, M - 1), row,
        share * steps // SPLIT_K, (share + 1) * steps // SPLIT_K, M, N, K, x_row_stride, row_words, groups,
        BITS, MIDPOINT, GROUP_SIZE, PIECE, GROUP_PIECES, BLOCK_PIECES, BLOCK_TILES, STEPS, SPAN, BLOCK_N, BLOCK_M, EVEN_K, PTX,
    )  # fmt: skip
    if SPLIT_K > 1:
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        shares = partial_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M) + inside
        tl.store(shares + share * (BLOCK_N * BLOCK_M), acc, cache_modifier=".cg")
        tl.debug_barrier()  # what all threads stored is there before one of them says so
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") < SPLIT_K - 1:
            return
        tl.debug_barrier()
        acc = tl.load(shares, cache_modifier=".cg")
        for other in range(1, SPLIT_K):
            acc += tl.load(shares + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    acc *= tl.load(global_scale_ptr)  # a power of two: exact here as it would be on the weight
    store_result(out_ptr, acc, n, m, N, M, bias_ptr, factor_ptr, residual_ptr, ACTIVATION, EVEN_N, EVEN_M)


def launch_arguments(
    x: Activations, layout: WordLayout, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor,
    codebook: Tensor | None, bias: Tensor | None, activation: str, factor: Tensor | None, residual: Tensor | None, out: Tensor,
    config: Config, ptx: bool,
) -> dict[str, object]:  # fmt: skip
    """Arguments of :func:`linear_kernel`, by name, for a launch and for a compile ahead of time alike.

    ``out`` is ``[M, N]``. No operand is read, so meta tensors do.
    """
    m, n = out.shape
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    split = config.split_k > 1
    partial = out.new_empty(tiles * config.split_k * config.block_n * config.block_m, dtype=torch.float32) if split else None
    return tile_arguments(x, layout, words, scale, offset, global_scale, codebook, config, ptx) | {
        "bias_ptr": bias,
        "factor_ptr": factor,
        "residual_ptr": residual,
        "partial_ptr": partial,
        "arrivals_ptr": out.new_zeros(tiles, dtype=torch.int32) if split else None,
        "out_ptr": out,
        "ACTIVATION": activation,
        "SPLIT_K": config.split_k,
        "EVEN_M": m % config.block_m == 0,
    }


def linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    codebook: Tensor | None = None,
    activation: str = "",
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    activation_bits: int = NOT_ROUNDED,
    config: Config | None = None,
) -> Tensor:
    """``residual + activation(x @ W.T + bias) * factor`` for ``x`` ``[..., K]`` of any strides, rounded once to its dtype.

    Args:
        x: float16, bfloat16 or float32.
        words, scale, offset, global_scale, bits, group_size, codebook: the packed weight, each tensor contiguous. ``words`` is
            int16 ``[N, row_words]``; ``scale`` and ``offset`` are float16 ``[G, N]``.
        bias: ``[N]`` of any floating dtype, or None.
        activation: one of :data:`~kbit_inductor.kernels.triton.epilogue.ACTIVATIONS`; the empty one does nothing.
        factor, residual: ``[..., N]`` of any floating dtype, or None.
        activation_bits: what ``x`` is rounded to (:mod:`kbit_inductor.kernels.triton.quantize`): 1 to 8, or 16 for not at all.
        config: how it is cut; by default that of :func:`default_config`.

    Sums are float32, in an order that does not change from call to call. With ``u(t)`` the unit roundoff of dtype ``t`` (half the
    distance from 1 to the next number)::

        |error| <= u(x.dtype) |y| + (K + 8) u(float32) a + u(float32) |bias|        to first order
        a = sum_k |x[k]| (|scale| (level + b) + |offset|) |global_scale|

    before activation, factor and residual, of ``x`` as it is rounded. ``b`` is 0 for float16, else up to 128, or 272 for levels of
    8 bits; of a rounded ``x`` it is 0, or 256. Tensor cores truncate where they add, which doubles ``u(float32)``. An infinite
    ``x`` gives a NaN.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: an unknown activation, or other ``activation_bits``.
    """
    check_activations(x, activation_bits, "linear")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are {', '.join(map(repr, ACTIVATIONS))}")
    n, k, m = words.size(0), x.size(-1), math.prod(x.shape[:-1])
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    layout = WordLayout.of(bits, k, group_size)
    config = config or default_config(m, n, layout, x.dtype if activation_bits == NOT_ROUNDED else torch.int8, device_of(x))
    factor, residual = (None if each is None else each.reshape(m, n).contiguous() for each in (factor, residual))
    arguments = launch_arguments(
        activations(x, layout, config, activation_bits), layout, words, scale, offset, global_scale, codebook, bias, activation,
        factor, residual, out.view(m, n), config, takes_ptx(x),
    )  # fmt: skip
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), config.split_k)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever device the tensors are on
        linear_kernel[grid](**arguments)
    return out
