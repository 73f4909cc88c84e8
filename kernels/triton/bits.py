"""Products of few bits on either side, counted: AND and popcount of bit vectors (layout: :mod:`kbit_inductor.kernels.layout`).

Codes of k bits are k bit vectors ``w_p``, as the planes of the storage format are already; activations rounded to j bits are j of
them, ``x_i``, the last with the weight of a sign (DoReFa-Net, Zhou et al., 2016; XNOR-Net, Rastegari et al., 2016)::

    sum code q  =  sum over p, i of  s_i 2 ** (p + i) popcount(w_p & x_i)      s_i = -1 for the sign bit, else 1
                =  sum over p of     2 ** p (popcount(x) - popcount(w_p ^ x))  at j = 1, where q is +-1

A word is 32 columns of a bit. What it adds is scaled by itself: the groups of a weight are whole words, and so are the segments
that share a step.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.layout import WORD_COLUMNS, midpoint
from kbit_inductor.kernels.reference import SEGMENT
from kbit_inductor.kernels.triton.epilogue import store_result
from kbit_inductor.kernels.triton.launch import check_activations, flat_rows, takes_ptx
from kbit_inductor.kernels.triton.quantize import round_segments

BLOCK_N = 16
BLOCK_WORDS = 32
BLOCK_SEGMENTS = 8


@triton.jit
def popcount(words, PTX: tl.constexpr):
    """Bits that are set in each of int32 ``words``."""
    if PTX:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        v = words.to(tl.uint32, bitcast=True)  # Warren, Hacker's Delight, 2012, figure 5-2
        v = v - ((v >> 1) & 0x55555555)
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        v = (v + (v >> 4)) & 0x0F0F0F0F
        return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["M"])
def slice_kernel(
    x_ptr, vectors_ptr, step_ptr, sums_ptr, M, K, x_row_stride, segments,
    GROUP_SIZE: tl.constexpr, GROUP_SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, BITS: tl.constexpr, BLOCK_SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Some segments of one row of ``x`` as bit vectors, int32 ``[BITS, M, words]``, and the step and the sum of each word."""
    m = tl.program_id(0)
    segment = tl.program_id(1) * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
    column = (segment % GROUP_SEGMENTS * SEGMENT)[:, None] + tl.arange(0, BLOCK)[None, :]  # of a group
    k = (segment // GROUP_SEGMENTS * GROUP_SIZE)[:, None] + column
    there = (column < GROUP_SIZE) & (k < K) & (segment < segments)[:, None]
    x = tl.load(x_ptr + m.to(tl.int64) * x_row_stride + k, mask=there, other=0.0).to(tl.float32)
    rounded, step = round_segments(x, there, BITS)

    words = K // 32
    in_words = tl.reshape(rounded.to(tl.int32), [BLOCK_SEGMENTS, BLOCK // 32, 32])
    first = column_of_words(segment, GROUP_SEGMENTS, SEGMENT, BLOCK)
    word = (segment // GROUP_SEGMENTS * GROUP_SIZE)[:, None] // 32 + first // 32
    kept = (first < GROUP_SIZE) & (word < words) & (segment < segments)[:, None]
    for i in tl.static_range(BITS):
        bit = (in_words > 0).to(tl.int32) if BITS == 1 else (in_words >> i) & 1
        vector = tl.sum(bit << tl.arange(0, 32)[None, None, :], 2)
        tl.store(vectors_ptr + (i * M + m).to(tl.int64) * words + word, vector, mask=kept)
    where = m.to(tl.int64) * words + word
    tl.store(step_ptr + where, tl.broadcast_to(step[:, None], where.shape), mask=kept)
    tl.store(sums_ptr + where, tl.sum(in_words, 2), mask=kept)


@triton.jit
def column_of_words(segment, GROUP_SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """The first column in its group of each word of ``segment``."""
    return (segment % GROUP_SEGMENTS * SEGMENT)[:, None] + tl.arange(0, BLOCK // 32)[None, :] * 32


@triton.jit(do_not_specialize=["M"])
def bits_kernel(
    vectors_ptr, step_ptr, sums_ptr, planes_ptr, scale_ptr, offset_ptr, global_scale_ptr, bias_ptr, out_ptr, M, N, words, groups,
    BITS: tl.constexpr, ACTIVATION_BITS: tl.constexpr, MIDPOINT: tl.constexpr, GROUP_WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_WORDS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` columns of one row of ``out``, ``[M, N]``, contiguous; consecutive programs share rows of the weight."""
    m = tl.program_id(0) % M
    n = tl.program_id(0) // M * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (n if EVEN_N else tl.minimum(n, N - 1)).to(tl.int64)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_WORDS], tl.float32)
    for first in range(0, words, BLOCK_WORDS):
        word = first + tl.arange(0, BLOCK_WORDS)
        there = word < words
        dots = tl.zeros([BLOCK_N, BLOCK_WORDS], tl.int32)
        sums = load_words(sums_ptr + m.to(tl.int64) * words + word, there, EVEN_WORDS)
        # By Horner's rule, from the most significant bits down.
        for p in tl.static_range(BITS):
            w = load_words(planes_ptr + (p * N + row) * words + word[None, :], there[None, :], EVEN_WORDS)
            plane_dots = tl.zeros([BLOCK_N, BLOCK_WORDS], tl.int32)
            for i in tl.static_range(ACTIVATION_BITS):
                vector = vectors_ptr + ((ACTIVATION_BITS - 1 - i) * M + m).to(tl.int64) * words
                x = load_words(vector + word, there, EVEN_WORDS)
                if ACTIVATION_BITS == 1:
                    plane_dots = popcount(x, PTX)[None, :] - popcount(w ^ x[None, :], PTX)
                elif i == 0:
                    plane_dots -= popcount(w & x[None, :], PTX)
                else:
                    plane_dots = 2 * plane_dots + popcount(w & x[None, :], PTX)
            dots = 2 * dots + plane_dots
        where = row * groups + (word // GROUP_WORDS)[None, :]
        scale = load_words(scale_ptr + where, there[None, :], EVEN_WORDS).to(tl.float32)
        step = load_words(step_ptr + m.to(tl.int64) * words + word, there, EVEN_WORDS)
        # Triton drops the untaken branch of a statement only.
        if offset_ptr is None:
            offset = -scale * MIDPOINT
        else:
            offset = load_words(offset_ptr + where, there[None, :], EVEN_WORDS).to(tl.float32)
        acc += (scale * dots.to(tl.float32) + offset * sums.to(tl.float32)[None, :]) * step[None, :]
    total = tl.sum(acc, 1)[:, None] * tl.load(global_scale_ptr)
    store_result(out_ptr, total, None, 0, n, m + tl.arange(0, 1), N, N, M, bias_ptr, None, None, None, "", EVEN_N, True)


@triton.jit
def load_words(pointers, there, EVEN: tl.constexpr):
    """What is at ``pointers``; zeros where nothing is ``there``, which is nowhere if ``EVEN``."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=there, other=0)


def slice_arguments(x: Tensor, vectors: Tensor, step: Tensor, sums: Tensor, group_size: int, bits: int) -> dict[str, object]:
    """Arguments of :func:`slice_kernel`, by name; ``x`` is ``[M, K]`` with columns side by side."""
    k = x.size(1)
    segments = triton.cdiv(group_size, SEGMENT)
    return {
        "x_ptr": x,
        "vectors_ptr": vectors,
        "step_ptr": step,
        "sums_ptr": sums,
        "M": x.size(0),
        "K": k,
        "x_row_stride": x.stride(0),
        "segments": triton.cdiv(k, group_size) * segments,
        "GROUP_SIZE": group_size,
        "GROUP_SEGMENTS": segments,
        "SEGMENT": SEGMENT,
        "BITS": bits,
        "BLOCK_SEGMENTS": BLOCK_SEGMENTS,
        "BLOCK": triton.next_power_of_2(min(SEGMENT, group_size)),
    }


def launch_arguments(
    vectors: Tensor, step: Tensor, sums: Tensor, planes: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor,
    bias: Tensor | None, group_size: int, out: Tensor, ptx: bool,
) -> dict[str, object]:  # fmt: skip
    """Arguments of :func:`bits_kernel`, by name; ``planes`` are int32 ``[k, N, words]``, ``out`` is ``[M, N]``."""
    bits, n, words = planes.shape
    return {
        "vectors_ptr": vectors,
        "step_ptr": step,
        "sums_ptr": sums,
        "planes_ptr": planes,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "global_scale_ptr": global_scale,
        "bias_ptr": bias,
        "out_ptr": out,
        "M": out.size(0),
        "N": n,
        "words": words,
        "groups": scale.size(1),
        "BITS": bits,
        "ACTIVATION_BITS": vectors.size(0),
        "MIDPOINT": midpoint(bits),
        "GROUP_WORDS": group_size // WORD_COLUMNS,
        "BLOCK_N": BLOCK_N,
        "BLOCK_WORDS": BLOCK_WORDS,
        "EVEN_N": n % BLOCK_N == 0,
        "EVEN_WORDS": words % BLOCK_WORDS == 0,
        "PTX": ptx,
    }


def linear_bits(
    x: Tensor, planes: Tensor, scale: Tensor, offset: Tensor | None, global_scale: Tensor, bias: Tensor | None, group_size: int,
    codebook: None, activation_bits: int,
) -> Tensor:  # fmt: skip
    """``x @ W.T + bias`` for ``x`` ``[..., K]`` of any strides, rounded to ``activation_bits``, and then once to its dtype.

    Args:
        x: float16, bfloat16 or float32.
        planes, scale, offset, global_scale, codebook: of the storage format; there can be no codebook.
        bias: ``[N]`` of any floating dtype, or None.
        group_size: a multiple of 32, and so is K.
        activation_bits: 1 to 8.

    Counts are exact. The error is that of :func:`~kbit_inductor.kernels.triton.linear.linear`.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: a codebook, a group size or K that is no multiple of 32, or other ``activation_bits``.
    """
    check_activations(x, activation_bits, "bits")
    if codebook is not None:
        raise ValueError("the Triton bits kernel takes uniform codes, not a codebook")
    k, n, m = x.size(-1), planes.size(1), math.prod(x.shape[:-1])
    group_size = min(group_size, k)
    if k % WORD_COLUMNS or group_size % WORD_COLUMNS:
        raise ValueError(f"the Triton bits kernel takes rows and groups of multiples of 32 columns, not of {k} and {group_size}")
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    words = k // WORD_COLUMNS
    vectors = torch.empty(activation_bits, m, words, dtype=torch.int32, device=x.device)
    step, sums = torch.empty(m, words, device=x.device), torch.empty(m, words, dtype=torch.int32, device=x.device)
    slicing = slice_arguments(flat_rows(x), vectors, step, sums, group_size, activation_bits)
    packed = (planes.view(torch.int32), scale, offset, global_scale)
    arguments = launch_arguments(vectors, step, sums, *packed, bias, group_size, out.view(m, n), takes_ptx(x))
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever device the tensors are on
        slice_kernel[m, triton.cdiv(slicing["segments"], BLOCK_SEGMENTS)](**slicing)
        bits_kernel[(triton.cdiv(n, BLOCK_N) * m,)](**arguments)
    return out
