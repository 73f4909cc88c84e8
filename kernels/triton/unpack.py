"""Codes out of words, as 16-bit floats that tensor cores take (layout: :mod:`kbit_inductor.kernels.words`).

No code is converted; it is put where a float has its mantissa. A float16 of exponent 0 is a subnormal, ``code * 2 ** -24``, times
a power of two by where in the mantissa the code begins. Products of such a bfloat16 would be lost below float32's range; with the
exponent of ``2 ** (7 - b)`` and the code from bit ``b`` of the mantissa on, it is ``2 ** (7 - b) + code``, for codes of 7 bits;
longer ones are two digits of 4. What has to be undone is a factor of a sum, and a term that is a multiple of the sum of x.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def widest_plane(bits):
    """Bits of the widest plane of codes of ``bits``."""
    return 1 << (bits.bit_length() - 1)


@triton.constexpr_function
def shift_of(piece, bits, width):
    """The bit of a word of the plane of ``width`` at which piece ``piece`` of a block begins."""
    widest = widest_plane(bits)
    slot, part = piece % (16 // widest), piece // (16 // widest) % (widest // width)
    return 8 * (slot % 2) + widest * (slot // 2) + width * part


@triton.constexpr_function
def low_of(width, bits):
    """The least bit of a code that is in the plane of ``width``."""
    return bits & (width - 1)


@triton.constexpr_function
def first_tile(width, bits, block_pieces):
    """The first tile of the plane of ``width`` in a block: it comes after those of all wider ones."""
    return (bits & ~(2 * width - 1)) * block_pieces // 16


@triton.constexpr_function
def mantissa_bit(piece, bits, half, direct, unrolled):
    """The bit of a ``half`` float's mantissa at which the code of piece ``piece`` of a block begins.

    One that is not ``direct``, of which something is to be made first, begins at 0. If the pieces of a block are ``unrolled``, it
    begins where half of the pieces are in their words, as far as the 10 or 7 bits have room.
    """
    if not direct:
        return 0
    room = (10 if half == tl.float16 else 7) - bits
    if unrolled:
        shift = shift_of(piece, bits, widest_plane(bits)) % 8
        return shift if shift <= room else room // 2 * 2  # an even one: the fewer there are, the fewer registers hold exponents
    return 0 if half == tl.float16 else room


@triton.constexpr_function
def digit_exponent(half, bit):
    """The bits of a ``half`` float in whose mantissa a digit begins at ``bit``: none, or the exponent of ``2 ** (7 - bit)``."""
    return 0 if half == tl.float16 else (127 + 7 - bit) * 128


@triton.jit
def find_piece(piece, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """Of pieces known at run time, the tiles of the plane of ``WIDTH`` that they are in, and their shifts there."""
    WIDEST: tl.constexpr = widest_plane(BITS)
    inside = piece % BLOCK_PIECES
    slot = inside % (16 // WIDEST)
    part = inside // (16 // WIDEST) % (WIDEST // WIDTH)
    tile = piece // BLOCK_PIECES * BLOCK_TILES + first_tile(WIDTH, BITS, BLOCK_PIECES) + inside * WIDTH // 16
    return tile, 8 * (slot % 2) + WIDEST * (slot // 2) + WIDTH * part


@triton.jit
def load_tile(row_ptr, tile, PIECE: tl.constexpr):
    """Words of one tile, int16, of the rows to whose first words ``row_ptr`` points. No other program needs them again."""
    return tl.load(row_ptr + tile * PIECE, eviction_policy="evict_first")


@triton.jit
def or_field(code, words, SHIFT: tl.constexpr, LOW: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """``code`` with bits ``SHIFT .. SHIFT + WIDTH - 1`` of each word at bits ``LOW ..``. In PTX, two words at a time."""
    MASK: tl.constexpr = (2**WIDTH - 1) << LOW
    if not PTX:
        moved = words >> (SHIFT - LOW) if SHIFT >= LOW else words << (LOW - SHIFT)
        return code | (moved & MASK)
    elif SHIFT >= LOW:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $2, {SHIFT - LOW}; lop3.b32 $0, t, {MASK * 65537}, $1, 0xEA; }}",
            "=r,r,r", [code, words], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shl.b32 t, $2, {LOW - SHIFT}; lop3.b32 $0, t, {MASK * 65537}, $1, 0xEA; }}",
            "=r,r,r", [code, words], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def or_moving_field(code, words, shift, LOW: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """:func:`or_field` with a shift that is known at run time."""
    MASK: tl.constexpr = (2**WIDTH - 1) << LOW
    shift = shift.to(tl.int16)
    if PTX:
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 s, t; and.b32 s, $3, 15; shr.b32 t, $2, s; shl.b32 t, t, {LOW}; "
            f"lop3.b32 $0, t, {MASK * 65537}, $1, 0xEA; }}",
            "=r,r,r,r", [code, words, shift], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return code | (((words >> shift) << LOW) & MASK)


@triton.jit
def or_plane(
    code, words, row_ptr, step, INDEX: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, PIECE: tl.constexpr, LOW: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """``code`` with the bits that a plane has of piece ``step * STEPS + INDEX``, if there is the plane, and the tile they are in.

    The code begins at bit ``LOW``. ``words`` is the plane's tile of the piece before, in which this piece may be too.
    """
    if BITS & WIDTH == 0:
        return code, words
    elif STEPS == BLOCK_PIECES:
        if INDEX * WIDTH % 16 == 0:
            words = load_tile(row_ptr, step * BLOCK_TILES + first_tile(WIDTH, BITS, BLOCK_PIECES) + INDEX * WIDTH // 16, PIECE)
        return or_field(code, words, shift_of(INDEX, BITS, WIDTH), LOW + low_of(WIDTH, BITS), WIDTH, PTX), words
    else:
        tile, shift = find_piece(step * STEPS + INDEX, BITS, WIDTH, BLOCK_PIECES, BLOCK_TILES)
        words = load_tile(row_ptr, tile, PIECE)
        return or_moving_field(code, words, shift, LOW + low_of(WIDTH, BITS), WIDTH, PTX), words


@triton.jit
def or_planes(
    code, words_8, words_4, words_2, words_1, row_ptr, step, INDEX: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr, BLOCK_TILES: tl.constexpr, PIECE: tl.constexpr, LOW: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """:func:`or_plane` for every plane: ``code`` with all bits of the piece, and the tiles they are in."""
    code, words_8 = or_plane(code, words_8, row_ptr, step, INDEX, STEPS, BITS, 8, BLOCK_PIECES, BLOCK_TILES, PIECE, LOW, PTX)
    code, words_4 = or_plane(code, words_4, row_ptr, step, INDEX, STEPS, BITS, 4, BLOCK_PIECES, BLOCK_TILES, PIECE, LOW, PTX)
    code, words_2 = or_plane(code, words_2, row_ptr, step, INDEX, STEPS, BITS, 2, BLOCK_PIECES, BLOCK_TILES, PIECE, LOW, PTX)
    code, words_1 = or_plane(code, words_1, row_ptr, step, INDEX, STEPS, BITS, 1, BLOCK_PIECES, BLOCK_TILES, PIECE, LOW, PTX)
    return code, words_8, words_4, words_2, words_1
