"""Rows of a packed table, gathered and dequantized in one pass (layout: :mod:`kbit_inductor.kernels.words`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.layout import level_bits, midpoint
from kbit_inductor.kernels.triton.launch import DTYPES
from kbit_inductor.kernels.triton.unpack import find_piece, low_of
from kbit_inductor.kernels.words import WordLayout

BLOCK_ROWS = 4
BLOCK_COLUMNS = 256


@triton.jit
def _plane_bits(
    rows, valid, piece, position, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """What the plane of ``WIDTH`` adds to the codes at ``position`` of ``piece``, int32; ``rows`` are pointers."""
    if BITS & WIDTH == 0:
        return tl.zeros(valid.shape, tl.int32)
    else:
        tile, shift = find_piece(piece, BITS, WIDTH, BLOCK_PIECES, BLOCK_TILES)
        words = tl.load(rows + (tile * PIECE + position)[None, :], mask=valid, other=0).to(tl.int32)
        return ((words >> shift[None, :]) & (2**WIDTH - 1)) << low_of(WIDTH, BITS)


@triton.jit(do_not_specialize=["count"])  # one compiled kernel for every number of indices
def embedding_kernel(
    indices_ptr, words_ptr, scale_ptr, offset_ptr, global_scale_ptr, codebook_ptr, out_ptr,
    count, rows, columns, row_words,
    BITS: tl.constexpr, MIDPOINT: tl.constexpr, GROUP_SIZE: tl.constexpr, PIECE: tl.constexpr, GROUP_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_M, BLOCK_K]`` tile of ``out``, float16/bfloat16/float32 ``[count, columns]``, contiguous."""
    tiles_k = tl.cdiv(columns, BLOCK_K)
    k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.load(indices_ptr + m, mask=m < count, other=0).to(tl.int64)
    known = (index >= 0) & (index < rows)
    valid = known[:, None] & (k < columns)[None, :]

    group = k // GROUP_SIZE
    piece = group * GROUP_PIECES + k % GROUP_SIZE // PIECE
    position = k % GROUP_SIZE % PIECE
    row_ptr = words_ptr + (index * row_words)[:, None]
    code = tl.zeros([BLOCK_M, BLOCK_K], tl.int32)
    for plane in tl.static_range(4):
        code |= _plane_bits(row_ptr, valid, piece, position, BITS, 2**plane, BLOCK_PIECES, BLOCK_TILES, PIECE)
    if codebook_ptr is not None:
        code = tl.load(codebook_ptr + code).to(tl.int32)

    where = group.to(tl.int64)[None, :] * rows + index[:, None]
    scale = tl.load(scale_ptr + where, mask=valid, other=0.0).to(tl.float32)
    # Triton drops the untaken branch of a statement only.
    if offset_ptr is None:  # noqa: SIM108
        offset = -scale * MIDPOINT
    else:
        offset = tl.load(offset_ptr + where, mask=valid, other=0.0).to(tl.float32)
    # scale * code is exact in float32, so the value is rounded once, fused multiply-add or not.
    weight = tl.where(known[:, None], (scale * code.to(tl.float32) + offset) * tl.load(global_scale_ptr), float("nan"))
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * columns + k[None, :]
    tl.store(out_ptrs, weight.to(out_ptr.dtype.element_ty), mask=(m < count)[:, None] & (k < columns)[None, :])


def launch_arguments(
    indices: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    bits: int,
    group_size: int,
    codebook: Tensor | None,
    out: Tensor,
) -> dict[str, object]:
    """Arguments of :func:`embedding_kernel`, by name; ``indices`` is ``[count]`` and ``out`` ``[count, K]``."""
    layout = WordLayout.of(bits, out.size(1), group_size)
    return {
        "indices_ptr": indices,
        "words_ptr": words,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "global_scale_ptr": global_scale,
        "codebook_ptr": codebook,
        "out_ptr": out,
        "count": indices.numel(),
        "rows": words.size(0),
        "columns": out.size(1),
        "row_words": layout.row_words,
        "BITS": bits,
        "MIDPOINT": midpoint(level_bits(bits, codebook is not None)),
        "GROUP_SIZE": layout.group_size,
        "PIECE": layout.piece,
        "GROUP_PIECES": layout.group_pieces,
        "BLOCK_PIECES": layout.block_pieces,
        "BLOCK_TILES": layout.block_tiles,
        "BLOCK_M": BLOCK_ROWS,
        "BLOCK_K": BLOCK_COLUMNS,
    }


def embedding(
    indices: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    embedding_dim: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> Tensor:
    """Rows ``indices`` (int32 or int64, ``[...]``) of the packed table as ``[..., embedding_dim]`` of ``dtype``.

    The values equal the reference's bit for bit. A kernel cannot raise: an index outside the table gives a row of NaN
    and reads nothing.

    Raises:
        TypeError: ``dtype`` is not float16, bfloat16 or float32.
    """
    if dtype not in DTYPES:
        raise TypeError(f"the Triton embedding kernel gives float16, bfloat16 or float32, not {dtype}")
    out = torch.empty(*indices.shape, embedding_dim, dtype=dtype, device=words.device)
    if out.numel() == 0:
        return out
    flat = indices.reshape(-1).contiguous()
    table = (words, scale, offset, global_scale, bits, group_size, codebook)
    arguments = launch_arguments(flat, *table, out.view(flat.numel(), embedding_dim))
    grid = (triton.cdiv(flat.numel(), BLOCK_ROWS) * triton.cdiv(embedding_dim, BLOCK_COLUMNS),)
    with torch.cuda.device_of(words):  # Triton launches on the current device, whatever device the tensors are on
        embedding_kernel[grid](**arguments)
    return out
