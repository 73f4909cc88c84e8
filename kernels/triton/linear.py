"""``residual + activation(x @ W.T + bias) * factor`` on words (layout: :mod:`kbit_inductor.kernels.words`).

One launch computes the products of one ``x`` with several matrices, such as a layer's queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.triton.config import Config, default_config
from kbit_inductor.kernels.triton.epilogue import NOTHING, Epilogue, check_epilogue, store_result
from kbit_inductor.kernels.triton.launch import (
    NOT_ROUNDED,
    Matrix,
    activations,
    check_activations,
    device_of,
    operand_dtype,
    takes_ptx,
    tile_arguments,
)
from kbit_inductor.kernels.triton.norm import Norm
from kbit_inductor.kernels.triton.quantize import Activations
from kbit_inductor.kernels.triton.split import add_up, store_and_arrive
from kbit_inductor.kernels.triton.tile import tile_sums
from kbit_inductor.kernels.words import WordLayout


@triton.jit
def _pick(values, index):
    """That of the tuple ``values`` at ``index``; None where they are."""
    value = values[0]
    if values[0] is not None:
        for i in tl.static_range(1, len(values)):
            value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def _find_matrix(tile, rows, BLOCK_N: tl.constexpr):
    """The matrix in which row tile ``tile`` of all is, its place among that matrix's, and the rows of those before it."""
    matrix, before, first_row = 0, 0, 0
    tiles = 0
    skipped = 0
    for i in tl.static_range(1, len(rows)):
        tiles += tl.cdiv(rows[i - 1], BLOCK_N)
        skipped += rows[i - 1]
        beyond = tile >= tiles
        matrix = tl.where(beyond, i, matrix)
        before = tl.where(beyond, tiles, before)
        first_row = tl.where(beyond, skipped, first_row)
    return matrix, tile - before, first_row


@triton.jit(do_not_specialize=["M"])  # one compiled kernel for every number of rows of a range
def linear_kernel(
    x_ptr, words_ptrs, scale_ptrs, offset_ptrs, global_scale_ptrs, codebook_ptrs, bias_ptrs, rows,
    factor_ptr, residual_ptr, step_ptr, sums_ptr, partial_ptr, arrivals_ptr, out_ptr,
    M, N, K, x_row_stride, row_words, groups, steps,
    BITS: tl.constexpr, MIDPOINT: tl.constexpr, GROUP_SIZE: tl.constexpr, PIECE: tl.constexpr, GROUP_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, STEPS: tl.constexpr, SPAN: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_N, BLOCK_M]`` tile of the transposed ``out``, float16/bfloat16/float32 ``[M, N]``, contiguous.

    The results of several matrices lie side by side. If they are ``GATED``, a program computes the tile of both of two matrices.
    With ``SPLIT_K`` programs to a tile, each computes a share of the steps, and the last to arrive adds the shares up in order.
    """
    # Consecutive programs share a tile of the weight, the larger operand, so that it is read from memory once.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    share = tl.program_id(1)
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if GATED:
        matrix, inside, first_row = 0, tile // tiles_m, 0
    else:
        matrix, inside, first_row = _find_matrix(tile // tiles_m, rows, BLOCK_N)
    n_rows = _pick(rows, matrix)
    n = inside * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n if EVEN_N else tl.minimum(n, n_rows - 1)
    x_row = m if EVEN_M else tl.minimum(m, M - 1)
    first = share * steps // SPLIT_K
    last = (share + 1) * steps // SPLIT_K
    offset_ptr = _pick(offset_ptrs, matrix)
    codebook_ptr = _pick(codebook_ptrs, matrix)
    acc = tile_sums(
        x_ptr, _pick(words_ptrs, matrix), _pick(scale_ptrs, matrix), offset_ptr, codebook_ptr, step_ptr, sums_ptr,
        x_row, row, first, last, M, n_rows, K, x_row_stride, row_words, groups,
        BITS, MIDPOINT, GROUP_SIZE, PIECE, GROUP_PIECES, BLOCK_PIECES, BLOCK_TILES, STEPS, SPAN, BLOCK_N, BLOCK_M, EVEN_K, PTX,
    )  # fmt: skip
    acc *= tl.load(_pick(global_scale_ptrs, matrix))  # a power of two: exact here as it would be on the weight
    second = None
    if GATED:
        second = tile_sums(
            x_ptr, words_ptrs[1], scale_ptrs[1], offset_ptrs[1], codebook_ptrs[1], step_ptr, sums_ptr,
            x_row, row, first, last, M, n_rows, K, x_row_stride, row_words, groups,
            BITS, MIDPOINT, GROUP_SIZE, PIECE, GROUP_PIECES, BLOCK_PIECES, BLOCK_TILES, STEPS, SPAN, BLOCK_N, BLOCK_M, EVEN_K, PTX,
        )  # fmt: skip
        second *= tl.load(global_scale_ptrs[1])
    if SPLIT_K > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        PARTS: tl.constexpr = 2 if GATED else 1
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        shares, is_last = store_and_arrive(partial_ptr, arrivals_ptr, acc, second, tile, share, SPLIT_K, PARTS, SIZE, place)
        if not is_last:
            return
        acc = add_up(shares, SPLIT_K, PARTS * SIZE)
        if GATED:
            second = add_up(shares + SIZE, SPLIT_K, PARTS * SIZE)
    bias_ptr = _pick(bias_ptrs, matrix)
    second_bias_ptr = bias_ptrs[1] if GATED else None
    store_result(
        out_ptr, acc, second, first_row, n, m, n_rows, N, M, bias_ptr, second_bias_ptr, factor_ptr, residual_ptr, ACTIVATION,
        EVEN_N, EVEN_M,
    )  # fmt: skip


def launch_arguments(
    x: Activations, layout: WordLayout, matrices: Sequence[Matrix], epilogue: Epilogue, out: Tensor, config: Config, ptx: bool,
) -> dict[str, object]:  # fmt: skip
    """Arguments of :func:`linear_kernel`, by name, for a launch and for a compile ahead of time alike.

    ``out`` is ``[M, N]``. No operand is read, so meta tensors do.
    """
    first, (m, n) = matrices[0], out.shape
    tiles = product_tiles(matrices, m, epilogue, config)
    split = config.split_k > 1
    size = tiles * config.split_k * config.block_n * config.block_m * (2 if epilogue.gated else 1)
    columns = ("words", "scale", "offset", "global_scale", "codebook", "bias")
    return tile_arguments(x, layout, first.scale.size(0), first.codebook is not None, config, ptx) | {
        **{f"{name}_ptrs": tuple(getattr(matrix, name) for matrix in matrices) for name in columns},
        "rows": tuple(matrix.rows for matrix in matrices),
        "factor_ptr": epilogue.factor,
        "residual_ptr": epilogue.residual,
        "partial_ptr": out.new_empty(size, dtype=torch.float32) if split else None,
        "arrivals_ptr": out.new_zeros(tiles, dtype=torch.int32) if split else None,
        "out_ptr": out,
        "N": n,
        "ACTIVATION": epilogue.activation,
        "GATED": epilogue.gated,
        "SPLIT_K": config.split_k,
        "EVEN_N": all(matrix.rows % config.block_n == 0 for matrix in matrices),
        "EVEN_M": m % config.block_m == 0,
    }


def product_tiles(matrices: Sequence[Matrix], m: int, epilogue: Epilogue, config: Config) -> int:
    """Tiles of the result, each computed by ``split_k`` programs."""
    counted = matrices[:1] if epilogue.gated else matrices
    return int(triton.cdiv(m, config.block_m)) * sum(int(triton.cdiv(matrix.rows, config.block_n)) for matrix in counted)


def config_of(x: Tensor, n: int, layout: WordLayout, activation_bits: int) -> Config:
    """How a product of ``x`` ``[..., K]`` with ``n`` rows of weights is cut, if nobody says otherwise."""
    return default_config(math.prod(x.shape[:-1]), n, layout, operand_dtype(x, activation_bits), device_of(x))


def fused_linear(
    x: Tensor, matrices: Sequence[Matrix], bits: int, group_size: int, norm: Norm | None = None, epilogue: Epilogue = NOTHING,
    activation_bits: int = NOT_ROUNDED, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """``residual + activation(norm(x) @ W.T + bias) * factor``, or ``residual + activation(first) * second`` of two gated matrices.

    Args:
        x: float16, bfloat16 or float32 ``[..., K]`` of any strides.
        matrices: of one K, ``bits``, ``group_size`` and kind: all with an offset, a codebook, a bias, or none. Their results lie
            side by side, ``[..., sum of N]``.
        norm: of ``x``, computed in float32 in front of the rounding; there is none of an ``x`` that is not rounded.
        epilogue: what follows; ``factor`` and ``residual`` are of the shape of the result.
        activation_bits: what ``x`` is rounded to (:mod:`kbit_inductor.kernels.triton.quantize`): 1 to 8, ``FP8``, or 16 for
            not at all.
        config: how it is cut; by default that of :func:`default_config`.

    The error is that of :func:`linear`; of a norm, rounded values may be those of a normed ``x`` off by ``(K + 8) u(float32)``.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: an unknown activation, other ``activation_bits``, or a norm of an ``x`` that is not rounded.
    """
    check_activations(x, activation_bits, "linear")
    check_epilogue(epilogue)
    if norm is not None and activation_bits == NOT_ROUNDED:
        raise ValueError("the Triton linear kernel computes a norm where it rounds activations, which it is not told to")
    k, m = x.size(-1), math.prod(x.shape[:-1])
    n = sum(matrix.rows for matrix in matrices) // (2 if epilogue.gated else 1)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    layout = WordLayout.of(bits, k, group_size)
    config = config or config_of(x, n, layout, activation_bits)
    arguments = launch_arguments(
        activations(x, layout, config, activation_bits, norm), layout, matrices, epilogue.flat(m, n), out.view(m, n), config,
        takes_ptx(x),
    )  # fmt: skip
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever device the tensors are on
        linear_kernel[product_tiles(matrices, m, epilogue, config), config.split_k](**arguments)
    return out


def linear(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, bias: Tensor | None, bits: int,
    group_size: int, codebook: Tensor | None = None, activation_bits: int = NOT_ROUNDED, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """``x @ W.T + bias`` for ``x`` ``[..., K]`` of any strides, rounded once to its dtype, by :func:`fused_linear`.

    Sums are float32, in an order that does not change from call to call. With ``u(t)`` the unit roundoff of dtype ``t`` (half the
    distance from 1 to the next number)::

        |error| <= u(x.dtype) |y| + (K + 8) u(float32) a + u(float32) |bias|        to first order
        a = sum_k |x[k]| (|scale| (level + b) + |offset|) |global_scale|

    of ``x`` as it is rounded. ``b`` is 0 for float16, else up to 128, or 272 for levels of 8 bits; of an ``x`` of integers it
    is 0, or 256. Tensor cores truncate where they add, which doubles ``u(float32)``; those of 8-bit floats keep 14 bits of the sum
    of a span, at most 128 columns, on Hopper. An infinite ``x`` gives a NaN.
    """
    matrix = Matrix(words, scale, offset, global_scale, codebook, bias)
    return fused_linear(x, (matrix,), bits, group_size, activation_bits=activation_bits, config=config)
