"""``residual + activation(x @ W.T + bias) * factor`` on words (layout: :mod:`kbit_inductor.kernels.words`).

The weight is the left operand of the tensor cores, so one row of ``x`` wastes little: an instruction takes 16 rows of the weight
and 8 of ``x``. Codes go in as they are (:mod:`kbit_inductor.kernels.triton.unpack`), and what a scale and an offset do to them is
done to float32 sums over a group::

    sum (s c + o) x  =  s sum c x + o sum x

so the weight itself is never rounded. A float32 ``x`` is the sum of three bfloat16.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kbit_inductor.kernels.layout import level_bits, midpoint
from kbit_inductor.kernels.triton.config import Config, Device, default_config
from kbit_inductor.kernels.triton.epilogue import ACTIVATIONS, store_result
from kbit_inductor.kernels.triton.unpack import mantissa_bit, or_field, or_plane
from kbit_inductor.kernels.words import WordLayout, pad_groups

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _multiply(left, x, acc):
    """``acc + left @ x``; a float32 ``x`` is cut into three bfloat16, which hold all of its 24 bits."""
    if x.dtype == tl.float32:
        head = x.to(tl.bfloat16)
        rest = x - head.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        tail = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(left, head, tl.dot(left, middle, tl.dot(left, tail, acc)))
    else:
        return tl.dot(left, x, acc)


@triton.jit
def _load_x(
    x_ptr, m, M, K, x_row_stride, piece,
    PIECE: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_PIECES: tl.constexpr, EVEN_K: tl.constexpr, EVEN_M: tl.constexpr,
):  # fmt: skip
    """Columns of ``piece`` of rows ``m``, ``[PIECE, len(m)]``; zeros in the padding. Rows past ``M`` repeat the last one."""
    if not EVEN_M:
        m = tl.minimum(m, M - 1)
    rows = x_ptr + m.to(tl.int64)[None, :] * x_row_stride
    if GROUP_SIZE % PIECE == 0:
        k = piece * PIECE + tl.arange(0, PIECE)[:, None]
        valid = k < K
    else:
        inside = piece % GROUP_PIECES * PIECE + tl.arange(0, PIECE)[:, None]
        k = piece // GROUP_PIECES * GROUP_SIZE + inside
        valid = (inside < GROUP_SIZE) & (k < K)
    if EVEN_K:
        return tl.load(rows + k, eviction_policy="evict_last")
    else:
        return tl.load(rows + k, mask=valid, other=0.0, eviction_policy="evict_last")


@triton.jit(do_not_specialize=["M"])  # one compiled kernel for every number of rows of a range
def linear_kernel(
    x_ptr, words_ptr, scale_ptr, offset_ptr, global_scale_ptr, codebook_ptr,
    bias_ptr, factor_ptr, residual_ptr, sums_ptr, partial_ptr, arrivals_ptr, out_ptr,
    M, N, K, x_row_stride, row_words, groups, steps,
    BITS: tl.constexpr, MIDPOINT: tl.constexpr, GROUP_SIZE: tl.constexpr, PIECE: tl.constexpr, GROUP_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, STEPS: tl.constexpr, SPAN: tl.constexpr, ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_N, BLOCK_M]`` tile of the transposed ``out``, float16/bfloat16/float32 ``[M, N]``, contiguous.

    A step is ``STEPS`` pieces; ``SPAN`` of them, 1 or 2, always share a group. With ``SPLIT_K`` programs to a tile, each computes
    a share of the steps, and the last to arrive adds the shares up in order.
    """
    # Consecutive programs share a tile of the weight, the larger operand, so that it is read from memory once.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    share = tl.program_id(1)
    m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n if EVEN_N else tl.minimum(n, N - 1)
    row_ptr = words_ptr + row.to(tl.int64)[:, None] * row_words + tl.arange(0, PIECE)[None, :]

    HALF: tl.constexpr = tl.float16 if x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    LEVEL_BITS: tl.constexpr = BITS if codebook_ptr is None else 8
    DIGITS: tl.constexpr = 2 if tl.bfloat16 == HALF and LEVEL_BITS == 8 else 1
    # A digit d of b bits as a bfloat16 is 2 ** b + d, its bits the first of the mantissa. As a float16 it is a subnormal, and may
    # begin at any bit of the mantissa, as long as it ends in it.
    DIGIT_BITS: tl.constexpr = 4 if DIGITS == 2 else LEVEL_BITS
    EXPONENT: tl.constexpr = 0 if tl.float16 == HALF else (127 + DIGIT_BITS) * 128
    BIAS: tl.constexpr = 0.0 if tl.float16 == HALF else 2.0**DIGIT_BITS * (17 if DIGITS == 2 else 1)
    DIRECT: tl.constexpr = DIGITS == 1 and codebook_ptr is None  # a code is the digit, not a step on the way to it
    UNROLLED: tl.constexpr = STEPS == BLOCK_PIECES

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_N, PIECE], 1.0, HALF)
    for step in range(share * steps // SPLIT_K, (share + 1) * steps // SPLIT_K):
        for i in tl.static_range(STEPS):
            if i % SPAN == 0:
                products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                low_products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                x_sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            x = _load_x(x_ptr, m, M, K, x_row_stride, step * STEPS + i, PIECE, GROUP_SIZE, GROUP_PIECES, EVEN_K, EVEN_M)

            code = tl.full([BLOCK_N, PIECE], EXPONENT if DIRECT else 0, tl.int16)
            if i == 0:
                words_8, words_4, words_2, words_1 = code, code, code, code
            code, words_8 = or_plane(
                code, words_8, row_ptr, step, i, STEPS, BITS, 8, BLOCK_PIECES, BLOCK_TILES, PIECE,
                mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED), PTX,
            )  # fmt: skip
            code, words_4 = or_plane(
                code, words_4, row_ptr, step, i, STEPS, BITS, 4, BLOCK_PIECES, BLOCK_TILES, PIECE,
                mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED), PTX,
            )  # fmt: skip
            code, words_2 = or_plane(
                code, words_2, row_ptr, step, i, STEPS, BITS, 2, BLOCK_PIECES, BLOCK_TILES, PIECE,
                mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED), PTX,
            )  # fmt: skip
            code, words_1 = or_plane(
                code, words_1, row_ptr, step, i, STEPS, BITS, 1, BLOCK_PIECES, BLOCK_TILES, PIECE,
                mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED), PTX,
            )  # fmt: skip
            if codebook_ptr is not None:
                code = tl.load(codebook_ptr + code).to(tl.int16)

            if DIGITS == 2:
                zero = tl.full([BLOCK_N, PIECE], EXPONENT, tl.int16)
                high, low = or_field(zero, code, 4, 3, 4, PTX), or_field(zero, code, 0, 3, 4, PTX)
                products = _multiply(high.to(HALF, bitcast=True), x, products)
                low_products = _multiply(low.to(HALF, bitcast=True), x, low_products)
            else:
                products = _multiply(code.to(HALF, bitcast=True), x, products)
            if sums_ptr is None:
                x_sums = _multiply(ones, x, x_sums)

            if (i + 1) % SPAN == 0:
                group = tl.minimum((step * STEPS + i) // GROUP_PIECES, groups - 1)
                where = group.to(tl.int64) * N + row
                scale = tl.load(scale_ptr + where).to(tl.float32)
                if offset_ptr is None:
                    offset = scale * (-BIAS - MIDPOINT)
                else:
                    offset = tl.load(offset_ptr + where).to(tl.float32) - scale * BIAS
                if DIGITS == 2:
                    products = products * 16 + low_products
                if sums_ptr is not None:
                    span = (step * STEPS + i) // SPAN
                    x_sums = tl.load(sums_ptr + span * M + tl.minimum(m, M - 1))[None, :]
                if tl.float16 == HALF:
                    scale *= 2.0 ** (24 - mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED))
                acc += scale[:, None] * products
                acc += offset[:, None] * x_sums

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


def span_sums(x: Tensor, layout: WordLayout, span: int) -> Tensor:
    """Sums of ``x`` ``[M, K]`` over each ``span`` pieces, float32 ``[spans, M]``."""
    padded = pad_groups(x, layout)
    return padded.view(x.size(0), -1, span * layout.piece).sum(-1, dtype=torch.float32).t().contiguous()


def launch_arguments(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    global_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    codebook: Tensor | None,
    activation: str,
    factor: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    config: Config,
    ptx: bool,
) -> dict[str, object]:
    """Arguments of :func:`linear_kernel`, by name, for a launch and for a compile ahead of time alike.

    ``x`` is ``[M, K]`` with columns side by side, ``out`` ``[M, N]``. No packed operand is read, so meta tensors do.
    """
    (m, k), n = x.shape, words.size(0)
    layout = WordLayout.of(bits, k, group_size)
    span = math.gcd(layout.group_pieces, config.steps, 2)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    split = config.split_k > 1
    partial = x.new_empty(tiles * config.split_k * config.block_n * config.block_m, dtype=torch.float32) if split else None
    return {
        "x_ptr": x,
        "words_ptr": words,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "global_scale_ptr": global_scale,
        "codebook_ptr": codebook,
        "bias_ptr": bias,
        "factor_ptr": factor,
        "residual_ptr": residual,
        "sums_ptr": span_sums(x, layout, span) if config.sums else None,
        "partial_ptr": partial,
        "arrivals_ptr": x.new_zeros(tiles, dtype=torch.int32) if split else None,
        "out_ptr": out,
        "M": m,
        "N": n,
        "K": k,
        "x_row_stride": x.stride(0),
        "row_words": layout.row_words,
        "groups": scale.size(0),
        "steps": layout.pieces // config.steps,
        "BITS": bits,
        "MIDPOINT": midpoint(level_bits(bits, codebook is not None)),
        "GROUP_SIZE": layout.group_size,
        "PIECE": layout.piece,
        "GROUP_PIECES": layout.group_pieces,
        "BLOCK_PIECES": layout.block_pieces,
        "BLOCK_TILES": layout.block_tiles,
        "STEPS": config.steps,
        "SPAN": span,
        "ACTIVATION": activation,
        "SPLIT_K": config.split_k,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "EVEN_N": n % config.block_n == 0,
        "EVEN_M": m % config.block_m == 0,
        "EVEN_K": layout.padded_columns == k,
        "PTX": ptx,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
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
        config: how it is cut; by default that of :func:`default_config`.

    Sums are float32, in an order that does not change from call to call. With ``u(t)`` the unit roundoff of dtype ``t`` (half the
    distance from 1 to the next number)::

        |error| <= u(x.dtype) |y| + (K + 8) u(float32) a + u(float32) |bias|        to first order
        a = sum_k |x[k]| (|scale| (level + b) + |offset|) |global_scale|

    before activation, factor and residual. ``b`` is 0 for float16, else ``2 ** bits``, or 272 for levels of 8 bits. Tensor
    cores truncate where they add, which doubles ``u(float32)``. An infinite ``x`` gives a NaN.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: an unknown activation.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"the Triton linear kernel takes float16, bfloat16 or float32, not {x.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are {', '.join(map(repr, ACTIVATIONS))}")
    n, k, m = words.size(0), x.size(-1), math.prod(x.shape[:-1])
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    flat = x.reshape(m, k)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    config = config or default_config(m, n, WordLayout.of(bits, k, group_size), x.dtype, _device(x))
    factor, residual = (None if each is None else each.reshape(m, n).contiguous() for each in (factor, residual))
    arguments = launch_arguments(
        flat, words, scale, offset, global_scale, bias, bits, group_size, codebook, activation, factor, residual, out.view(m, n),
        config, ptx=x.is_cuda and torch.version.hip is None,
    )  # fmt: skip
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), config.split_k)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever device the tensors are on
        linear_kernel[grid](**arguments)
    return out


def _device(x: Tensor) -> Device:
    if not x.is_cuda:
        return Device()
    properties = torch.cuda.get_device_properties(x.device)
    amd = torch.version.hip is not None
    return Device(properties.multi_processor_count, wgmma=not amd and properties.major == 9, least_rows=16 if amd else 8)
