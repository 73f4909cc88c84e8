"""A float weight from words, for products of so many rows of ``x`` that reading it again costs less than unpacking it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.layout import level_bits, midpoint
from kbit_inductor.kernels.triton.launch import DTYPES, Matrix, takes_ptx
from kbit_inductor.kernels.triton.tile import load_grid
from kbit_inductor.kernels.triton.unpack import or_planes
from kbit_inductor.kernels.words import WordLayout

BLOCK_ROWS = 16
WEIGHTS_AT_ONCE = 1 << 26  # 128 MiB of 16-bit floats


@triton.jit
def dequantize_kernel(
    words_ptr, scale_ptr, offset_ptr, global_scale_ptr, codebook_ptr, out_ptr, N, K, row_words, groups,
    BITS: tl.constexpr, MIDPOINT: tl.constexpr, GROUP_SIZE: tl.constexpr, PIECE: tl.constexpr, GROUP_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One block of pieces of ``BLOCK_N`` rows of ``out``, float16/bfloat16/float32 ``[N, K]``, contiguous."""
    block = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n if EVEN else tl.minimum(n, N - 1)
    row_ptr = words_ptr + row.to(tl.int64)[:, None] * row_words + tl.arange(0, PIECE)[None, :]
    global_scale = tl.load(global_scale_ptr)
    for i in tl.static_range(BLOCK_PIECES):
        code = tl.zeros([BLOCK_N, PIECE], tl.int16)
        if i == 0:
            words_8, words_4, words_2, words_1 = code, code, code, code
        code, words_8, words_4, words_2, words_1 = or_planes(
            code, words_8, words_4, words_2, words_1, row_ptr, block, i, BLOCK_PIECES, BITS, BLOCK_PIECES, BLOCK_TILES, PIECE,
            0, PTX,
        )  # fmt: skip
        if codebook_ptr is not None:
            code = tl.load(codebook_ptr + code).to(tl.int16)
        piece = block * BLOCK_PIECES + i
        group = piece // GROUP_PIECES
        scale, offset = load_grid(scale_ptr, offset_ptr, tl.minimum(group, groups - 1).to(tl.int64) * N + row, 0.0, MIDPOINT)
        # scale * code is exact in float32, so the value is rounded once, fused multiply-add or not.
        weight = (scale[:, None] * code.to(tl.float32) + offset[:, None]) * global_scale
        inside = piece % GROUP_PIECES * PIECE + tl.arange(0, PIECE)
        k = group * GROUP_SIZE + inside
        where = out_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
        if EVEN:
            tl.store(where, weight.to(out_ptr.dtype.element_ty))
        else:
            mask = (n < N)[:, None] & ((inside < GROUP_SIZE) & (k < K))[None, :]
            tl.store(where, weight.to(out_ptr.dtype.element_ty), mask=mask)


def launch_arguments(
    layout: WordLayout, words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, codebook: Tensor | None,
    out: Tensor, ptx: bool,
) -> dict[str, object]:  # fmt: skip
    """Arguments of :func:`dequantize_kernel`, by name; ``out`` is ``[N, K]``."""
    n, k = out.shape
    return {
        "words_ptr": words,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "global_scale_ptr": global_scale,
        "codebook_ptr": codebook,
        "out_ptr": out,
        "N": n,
        "K": k,
        "row_words": layout.row_words,
        "groups": scale.size(0),
        "BITS": layout.bits,
        "MIDPOINT": midpoint(level_bits(layout.bits, codebook is not None)),
        "GROUP_SIZE": layout.group_size,
        "PIECE": layout.piece,
        "GROUP_PIECES": layout.group_pieces,
        "BLOCK_PIECES": layout.block_pieces,
        "BLOCK_TILES": layout.block_tiles,
        "BLOCK_N": BLOCK_ROWS,
        "EVEN": n % BLOCK_ROWS == 0 and layout.padded_columns == k,
        "PTX": ptx,
    }


def dequantize(
    words: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, bits: int, columns: int, group_size: int,
    codebook: Tensor | None = None, dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """The weight ``[N, columns]`` of ``dtype``, bit for bit that of :func:`kbit_inductor.kernels.reference.dequantize`.

    Args:
        words, scale, offset, global_scale, bits, group_size, codebook: as for :func:`~kbit_inductor.kernels.triton.linear.linear`.
        columns: K.
        dtype: float16, bfloat16 or float32.

    Raises:
        TypeError: another dtype.
    """
    if dtype not in DTYPES:
        raise TypeError(f"the Triton dequantize kernel gives float16, bfloat16 or float32, not {dtype}")
    layout = WordLayout.of(bits, columns, group_size)
    out = torch.empty(words.size(0), columns, dtype=dtype, device=words.device)
    if out.numel():
        arguments = launch_arguments(layout, words, scale, offset, global_scale, codebook, out, takes_ptx(words))
        grid = (triton.cdiv(words.size(0), BLOCK_ROWS), layout.pieces // layout.block_pieces)
        with torch.cuda.device_of(words):  # Triton launches on the current device, whatever device the tensors are on
            dequantize_kernel[grid](**arguments)
    return out


def linear_by_float(x: Tensor, matrices: Sequence[Matrix], bits: int, group_size: int) -> Tensor:
    """``x @ W.T + bias`` by PyTorch's product, with :data:`WEIGHTS_AT_ONCE` of ``W`` in float at a time; several lie side by side.

    Operands are those of :func:`~kbit_inductor.kernels.triton.linear.fused_linear`; ``W`` and ``bias`` are rounded to the dtype of
    ``x`` first, which adds ``u(x.dtype) (|x| @ |W|.T + |bias|)`` to its error.
    """
    step = max(1, WEIGHTS_AT_ONCE // max(1, x.size(-1)))
    flat = x.reshape(-1, x.size(-1))
    out = torch.empty(flat.size(0), sum(matrix.rows for matrix in matrices), dtype=x.dtype, device=x.device)
    begin = 0
    for matrix in matrices:
        for start in range(0, matrix.rows, step):
            rows = slice(start, start + step)
            zero = None if matrix.offset is None else matrix.offset[:, rows].contiguous()
            packed = (matrix.words[rows], matrix.scale[:, rows].contiguous(), zero, matrix.global_scale)
            weight = dequantize(*packed, bits, x.size(-1), group_size, matrix.codebook, x.dtype)
            part = out[:, begin : begin + weight.size(0)]
            if matrix.bias is None:
                torch.mm(flat, weight.t(), out=part)
            else:
                torch.addmm(matrix.bias[rows].to(x.dtype), flat, weight.t(), out=part)
            begin += weight.size(0)
    return out.view(*x.shape[:-1], -1)
