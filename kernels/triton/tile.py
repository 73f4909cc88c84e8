"""The sums of one tile of a product on words: what every product's kernel has in common.

The weight is the left operand of the tensor cores, so one row of ``x`` wastes little: an instruction takes 16 rows of the weight
and 8 of ``x``. Codes go in as they are (:mod:`kbit_inductor.kernels.triton.unpack`), and what a scale and an offset do to them is
done to float32 sums over a group::

    sum (s c + o) x  =  s sum c x + o sum x

so the weight itself is never rounded. A float32 ``x`` is the sum of three bfloat16. An int8 ``x``
(:mod:`kbit_inductor.kernels.triton.quantize`) is multiplied by codes as integers, exactly. For an ``x`` of 8-bit floats a code of
4 bits is one as it is: below ``2 ** 4`` the e4m3 of a byte is its value times ``2 ** -9``; longer codes are two digits. Tensor
cores may sum their products with fewer bits than float32 has, so that sums of a group are added up outside (DeepSeek-V3, 2024).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kbit_inductor.kernels.triton.unpack import digit_exponent, mantissa_bit, or_field, or_planes


@triton.jit
def _multiply(left, x, acc):
    """``acc + left @ x``; a float32 ``x`` is cut into three bfloat16, which hold all of its 24 bits.

    Of 8 bits, tensor cores take 32 columns or more; fewer are as exact as float16, whose products a float32 ``acc`` sums.
    """
    if x.dtype == tl.float8e4nv and x.shape[0] < 32:
        return tl.dot(left.to(tl.float16), x.to(tl.float16), acc)
    elif x.dtype == tl.int8:
        if acc.dtype == tl.int32:
            return tl.dot(left, x, acc, out_dtype=tl.int32)
        else:
            return tl.dot(left.to(tl.float16), x.to(tl.float16), acc)
    elif x.dtype == tl.float32:
        head = x.to(tl.bfloat16)
        rest = x - head.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        tail = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(left, head, tl.dot(left, middle, tl.dot(left, tail, acc)))
    else:
        return tl.dot(left, x, acc)


@triton.jit
def _load_x(
    x_ptr, m, K, x_row_stride, piece,
    PIECE: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_PIECES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Columns of ``piece`` of rows ``m``, ``[PIECE, len(m)]``; zeros in the padding."""
    rows = x_ptr + m.to(tl.int64)[None, :] * x_row_stride
    if GROUP_SIZE % PIECE == 0:
        k = piece * PIECE + tl.arange(0, PIECE)[:, None]
        valid = k < K
    else:
        inside = piece % GROUP_PIECES * PIECE + tl.arange(0, PIECE)[:, None]
        k = piece // GROUP_PIECES * GROUP_SIZE + inside
        valid = (inside < GROUP_SIZE) & (k < K)
    return tl.load(rows + k, mask=None if EVEN_K else valid, other=None if EVEN_K else 0.0, eviction_policy="evict_last")


@triton.constexpr_function
def digits_of(level_bits, x_type):
    """How many floats a level of ``level_bits`` is the sum of: two where one float of what multiplies ``x`` cannot hold it."""
    longest = {tl.int8: 8, tl.float8e4nv: 4, tl.float16: 8}.get(x_type, 7)
    return 1 if level_bits <= longest else 2


@triton.constexpr_function
def bias_of(level_bits, x_type, half, bit):
    """How much more than its level is what is multiplied: a float whose digit begins at ``bit``, two such digits, or an int8."""
    if x_type == tl.float8e4nv:
        return 0.0
    if x_type == tl.int8:
        return -128.0 if level_bits == 8 else 0.0
    if half == tl.float16:
        return 0.0
    return 17 * 2.0**4 if level_bits == 8 else 2.0 ** (7 - bit)


@triton.jit
def load_grid(scale_ptr, offset_ptr, where, BIAS: tl.constexpr, MIDPOINT: tl.constexpr):
    """Scale and offset at ``where``, float32, of digits that are ``BIAS`` more than a level."""
    scale = tl.load(scale_ptr + where).to(tl.float32)
    # Triton drops the untaken branch of a statement only.
    if offset_ptr is None:  # noqa: SIM108
        offset = scale * (-BIAS - MIDPOINT)
    else:
        offset = tl.load(offset_ptr + where).to(tl.float32) - scale * BIAS
    return scale, offset


@triton.jit
def tile_sums(
    x_ptr, words_ptr, scale_ptr, offset_ptr, codebook_ptr, step_ptr, sums_ptr, m, row, first, last, M, N, K, x_row_stride,
    row_words, groups,
    BITS: tl.constexpr, MIDPOINT: tl.constexpr, GROUP_SIZE: tl.constexpr, PIECE: tl.constexpr, GROUP_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, STEPS: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``W[row] @ x[m].T`` over steps ``first .. last - 1``, float32 ``[BLOCK_N, BLOCK_M]``, without the global scale.

    A rounded ``x`` has a sum for each span, ``[spans, M]``, and a step: an int8 one for each span, one of 8-bit floats, which
    float16 may hold, for each row.
    A step of the loop is ``STEPS`` pieces; ``SPAN`` of them (1, 2) share a group. ``row`` is below ``N``, ``m`` below ``M``.
    """
    row_ptr = words_ptr + row.to(tl.int64)[:, None] * row_words + tl.arange(0, PIECE)[None, :]
    X: tl.constexpr = x_ptr.dtype.element_ty
    ROUNDED: tl.constexpr = tl.int8 == X
    FP8: tl.constexpr = tl.float8e4nv == X
    HALF: tl.constexpr = tl.float16 if x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    LEVEL_BITS: tl.constexpr = BITS if codebook_ptr is None else 8
    DIGITS: tl.constexpr = digits_of(LEVEL_BITS, X)
    DIRECT: tl.constexpr = (
        DIGITS == 1 and codebook_ptr is None and not ROUNDED and not FP8
    )  # a code is the digit, not a step on the way to it
    UNROLLED: tl.constexpr = STEPS == BLOCK_PIECES
    SUM: tl.constexpr = tl.int32 if ROUNDED and PIECE >= 32 else tl.float32

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_N, PIECE], 1.0, HALF)
    for step in range(first, last):
        for i in tl.static_range(STEPS):
            if i % SPAN == 0:
                products = tl.zeros([BLOCK_N, BLOCK_M], SUM)
                low_products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                x_sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            x = _load_x(x_ptr, m, K, x_row_stride, step * STEPS + i, PIECE, GROUP_SIZE, GROUP_PIECES, EVEN_K)

            code = tl.full(
                [BLOCK_N, PIECE], digit_exponent(HALF, mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED)) if DIRECT else 0, tl.int16
            )
            if i == 0:
                words_8, words_4, words_2, words_1 = code, code, code, code
            code, words_8, words_4, words_2, words_1 = or_planes(
                code, words_8, words_4, words_2, words_1, row_ptr, step, i, STEPS, BITS, BLOCK_PIECES, BLOCK_TILES, PIECE,
                mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED), PTX,
            )  # fmt: skip
            if codebook_ptr is not None:
                code = tl.load(codebook_ptr + code).to(tl.int16)

            if ROUNDED:
                products = _multiply((code ^ 128 if LEVEL_BITS == 8 else code).to(tl.int8), x, products)
            elif FP8:
                products = _multiply((code if DIGITS == 1 else code >> 4).to(tl.int8).to(X, bitcast=True), x, products)
                if DIGITS == 2:
                    low_products = _multiply((code & 15).to(tl.int8).to(X, bitcast=True), x, low_products)
            elif DIGITS == 2:
                zero = tl.full([BLOCK_N, PIECE], digit_exponent(HALF, 3), tl.int16)
                high, low = or_field(zero, code, 4, 3, 4, PTX), or_field(zero, code, 0, 3, 4, PTX)
                products = _multiply(high.to(HALF, bitcast=True), x, products)
                low_products = _multiply(low.to(HALF, bitcast=True), x, low_products)
            else:
                products = _multiply(code.to(HALF, bitcast=True), x, products)
            if sums_ptr is None:
                x_sums = _multiply(ones, x, x_sums)

            if (i + 1) % SPAN == 0:
                group = tl.minimum((step * STEPS + i) // GROUP_PIECES, groups - 1)
                scale, offset = load_grid(
                    scale_ptr, offset_ptr, group.to(tl.int64) * N + row,
                    bias_of(LEVEL_BITS, X, HALF, mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED)), MIDPOINT,
                )  # fmt: skip
                if DIGITS == 2:
                    products = products * 16 + low_products
                if sums_ptr is not None:
                    span = (step * STEPS + i) // SPAN
                    x_sums = tl.load(sums_ptr + span * M + m)[None, :]
                if ROUNDED:
                    products = products.to(tl.float32) * tl.load(step_ptr + (step * STEPS + i) // SPAN * M + m)[None, :]
                elif FP8:
                    scale *= 2.0**9
                elif tl.float16 == HALF:
                    scale *= 2.0 ** (24 - mantissa_bit(i, BITS, HALF, DIRECT, UNROLLED))
                acc += scale[:, None] * products
                acc += offset[:, None] * x_sums
    if step_ptr is not None and not ROUNDED:
        acc *= tl.load(step_ptr + m)[None, :]
    return acc
