"""Products with a batch of matrices ``[E, N, K]``, the experts of a mixture, in one launch.

A program finds its matrix and its rows of ``x`` by itself, so the host waits for no count of rows. Rows that are sorted by matrix
are cut into tiles group by group: of ``T`` rows and ``G`` groups there are at most ``T // BLOCK_M + G`` tiles, and as many programs
are launched; those that find no tile do nothing. (After the grouped product of MegaBlocks, Gale et al., 2023, without its padding.)
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.triton.config import Config, default_config
from kbit_inductor.kernels.triton.epilogue import store_result
from kbit_inductor.kernels.triton.launch import (
    NOT_ROUNDED,
    activations,
    check_activations,
    device_of,
    operand_dtype,
    takes_ptx,
    tile_arguments,
)
from kbit_inductor.kernels.triton.quantize import Activations
from kbit_inductor.kernels.triton.tile import tile_sums
from kbit_inductor.kernels.words import WordLayout


@triton.jit
def _tile_of_group(offsets_ptr, tile, M, count, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The matrix of a tile, its first row and the end of its group. Rows past the last group are one of matrix ``count``."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(offsets_ptr + e, mask=e < count, other=M).to(tl.int32)
    begin = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e <= count), other=0).to(tl.int32)
    tiles = tl.where(e <= count, tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M), 0)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)  # of one group, or of none
    first = begin + (tile - before) * BLOCK_M
    return tl.sum(tl.where(mine, e, 0), 0), tl.sum(tl.where(mine, first, 0), 0), tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _tile_of_entry(index_ptr, tile, entry_rows, count, BLOCK_M: tl.constexpr):
    """The matrix of a tile, its first row and the end of its entry, where every entry of the batch has ``entry_rows`` rows."""
    tiles = tl.cdiv(entry_rows, BLOCK_M)
    entry = tile // tiles
    if index_ptr is None:
        matrix = entry
    else:
        matrix = tl.load(index_ptr + entry).to(tl.int32)
        matrix = tl.where(matrix < 0, matrix + count, matrix)
    return matrix, entry * entry_rows + tile % tiles * BLOCK_M, (entry + 1) * entry_rows


@triton.jit(do_not_specialize=["M", "tiles", "entry_rows"])
def grouped_kernel(
    x_ptr, words_ptr, scale_ptr, offset_ptr, global_scale_ptr, codebook_ptr, where_ptr, step_ptr, sums_ptr, out_ptr,
    M, N, K, x_row_stride, row_words, groups, steps, count, tiles, entry_rows,
    BITS: tl.constexpr, MIDPOINT: tl.constexpr, GROUP_SIZE: tl.constexpr, PIECE: tl.constexpr, GROUP_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, STEPS: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, EVEN_K: tl.constexpr,
    FILL: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_N, BLOCK_M]`` tile of the transposed ``out``, ``[M, N]``, contiguous. ``FILL`` stands where there is no matrix.

    ``where_ptr`` are the ends of groups of rows, if ``BLOCK_E`` is not 0, else the matrices of entries of ``entry_rows`` rows.
    """
    tile = tl.program_id(0) % tiles
    if BLOCK_E > 0:
        matrix, first, end = _tile_of_group(where_ptr, tile, M, count, BLOCK_M, BLOCK_E)
    else:
        matrix, first, end = _tile_of_entry(where_ptr, tile, entry_rows, count, BLOCK_M)
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)

    known = (matrix >= 0) & (matrix < count) & (first < end)
    which = tl.where(known, matrix, 0).to(tl.int64)
    grid = which * groups * N
    acc = tile_sums(
        x_ptr, words_ptr + which * N * row_words, scale_ptr + grid, None if offset_ptr is None else offset_ptr + grid,
        None if codebook_ptr is None else codebook_ptr + which * 2**BITS, step_ptr, sums_ptr,
        m if EVEN_M else tl.maximum(tl.minimum(m, end - 1), 0), n if EVEN_N else tl.minimum(n, N - 1),
        0, tl.where(known, steps, 0), M, N, K, x_row_stride, row_words, groups,
        BITS, MIDPOINT, GROUP_SIZE, PIECE, GROUP_PIECES, BLOCK_PIECES, BLOCK_TILES, STEPS, SPAN, BLOCK_N, BLOCK_M, EVEN_K, PTX,
    )  # fmt: skip
    acc = tl.where(known, acc * tl.load(global_scale_ptr + which), FILL)
    store_result(out_ptr, acc, None, 0, n, m, N, N, end, None, None, None, None, "", EVEN_N, EVEN_M)


def launch_arguments(
    x: Activations, layout: WordLayout, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor,
    codebook: Tensor | None, where: Tensor | None, entry_rows: int | None, fill: float, out: Tensor, config: Config, ptx: bool,
) -> dict[str, object]:  # fmt: skip
    """Arguments of :func:`grouped_kernel`, by name; ``out`` is ``[M, N]``.

    ``entry_rows`` are the rows of each entry of a batch; None where ``where`` says at which row those of each matrix end.
    """
    m, count = out.size(0), words.size(0)
    if entry_rows is None:
        tiles, block_e = m // config.block_m + min(count + 1, m), triton.next_power_of_2(count + 1)
    else:
        tiles, block_e = m // entry_rows * triton.cdiv(entry_rows, config.block_m), 0
    return tile_arguments(x, layout, scale.size(-2), codebook is not None, config, ptx) | {
        "words_ptr": words,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "global_scale_ptr": global_scale,
        "codebook_ptr": codebook,
        "N": words.size(-2),
        "where_ptr": where,
        "out_ptr": out,
        "count": count,
        "tiles": tiles,
        "entry_rows": entry_rows or 0,
        "BLOCK_E": block_e,
        "EVEN_N": words.size(-2) % config.block_n == 0,
        "EVEN_M": entry_rows is not None and entry_rows % config.block_m == 0,
        "FILL": fill,
    }


def _launch(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, where: Tensor | None, bits: int,
    group_size: int, codebook: Tensor | None, activation_bits: int, entry_rows: int | None, fill: float, config: Config | None,
) -> Tensor:  # fmt: skip
    count, n, _ = words.shape
    m, k = math.prod(x.shape[:-1]), x.size(-1)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    layout = WordLayout.of(bits, k, group_size)
    if config is None:
        rows, dtype = entry_rows or triton.cdiv(m, count), operand_dtype(x, activation_bits)
        # Columns are not split: there are programs enough without.
        config = dataclasses.replace(default_config(rows, n, layout, dtype, device_of(x)), split_k=1)
    arguments = launch_arguments(
        activations(x, layout, config, activation_bits), layout, words, scale, offset, global_scale, codebook, where, entry_rows,
        fill, out.view(m, n), config, takes_ptx(x),
    )  # fmt: skip
    grid = (arguments["tiles"] * triton.cdiv(n, config.block_n),)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever device the tensors are on
        grouped_kernel[grid](**arguments)
    return out


def grouped_linear(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, offsets: Tensor, bits: int,
    group_size: int, codebook: Tensor | None = None, activation_bits: int = NOT_ROUNDED, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """``x[t] @ W[e].T`` for rows ``offsets[e - 1] <= t < offsets[e]`` of ``x`` ``[T, K]``; zeros past the last of ``offsets``.

    Args:
        x: float16, bfloat16 or float32, of any strides.
        words, scale, offset, global_scale, codebook: operands of :func:`~kbit_inductor.kernels.triton.linear.linear`, stacked.
        offsets: int32 or int64 ``[E]``, ascending, none above T.
        bits, group_size: of all matrices.
        activation_bits: what ``x`` is rounded to, 1 to 8, or 16 for not at all.
        config: how it is cut, without a split.

    The error is that of ``linear``.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: other ``activation_bits``.
    """
    check_activations(x, activation_bits, "grouped_linear")
    packed = (words, scale, offset, global_scale)
    return _launch(x, *packed, offsets.contiguous(), bits, group_size, codebook, activation_bits, None, 0.0, config)


def batched_linear(
    x: Tensor, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, index: Tensor | None, bits: int,
    group_size: int, codebook: Tensor | None = None, activation_bits: int = NOT_ROUNDED, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """``x[b] @ W[index[b]].T`` for ``x`` ``[B, M, K]``; of ``W[b]`` without an index.

    A kernel cannot raise: an index outside the batch gives an entry of NaN. More entries than matrices are sorted by matrix first,
    so that a matrix is not read again for each of them.

    Args:
        index: int32 or int64 ``[B]``, negative ones from the end; or None where B is E.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: other ``activation_bits``; or no index, and ``x`` has not as many entries as the weight has matrices.
    """
    check_activations(x, activation_bits, "batched_linear")
    (entries, rows, _), count = x.shape, words.size(0)
    if index is None and entries != count:
        raise ValueError(f"x has a batch of {entries}, the packed weight one of {count}")
    packed = (words, scale, offset, global_scale)
    if index is None or entries <= count:
        index = None if index is None else index.contiguous()
        return _launch(x, *packed, index, bits, group_size, codebook, activation_bits, rows, float("nan"), config)
    matrix = torch.where(index < 0, index + count, index)
    matrix, order = torch.where(matrix < 0, count, matrix).sort()  # what is outside comes last
    ends = torch.searchsorted(matrix, torch.arange(count, device=x.device), right=True) * rows
    sorted_rows = x[order].flatten(0, 1)
    product = _launch(sorted_rows, *packed, ends, bits, group_size, codebook, activation_bits, None, float("nan"), config)
    product = product.view(entries, rows, -1)
    return torch.empty_like(product).index_copy_(0, order, product)
