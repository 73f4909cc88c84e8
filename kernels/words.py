"""The layout of a weight for GPUs: 16-bit words whose shifts are whole pieces of a row.

The codes of ``k`` bits are cut into **planes** of power-of-two width, the widest first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1. A row is cut into **pieces** of 16, 32 or 64 columns that straddle no group; a group that is no multiple of a
piece is padded with zeros. Of a plane of ``w`` bits, ``16 / w`` consecutive pieces are a **tile**, one word for each position in
a piece::

    tile[j]  =  sum over i of  plane[piece i, column j] << shift(i)

So a shift of a tile is a piece, in order: nothing is interleaved, and a word is loaded once. As many pieces as one tile of the
narrowest plane holds are a **block**, and the tiles of a block lie together, so a row is read from front to back. Words of two
neighbouring columns share a register, so that one instruction extracts both.

Piece ``i`` of the widest plane, of ``W`` bits, is at bit ``8 (i % 2) + W (i // 2)``; the bits that narrower planes add to it lie in
the same ``W`` bits of theirs. So one shift by 8 brings half of the pieces to where the others are, and a kernel whose sums know
what bit a code begins at needs no other.

Marlin (Frantar et al., 2024) and FasterTransformer permute codes for the same end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kbit_inductor.kernels.layout import group_count

WORD_BITS = 16
PIECES = (64, 32, 16)
MAX_PADDING = 17 / 16
"""A longer piece may make a row longer by up to this factor: it needs fewer instructions for each weight."""


@dataclass(frozen=True)
class Plane:
    """Bits ``low .. low + width - 1`` of every code.

    Attributes:
        low: the least significant of its bits.
        width: how many they are: 1, 2, 4 or 8.
        first_tile: its first tile in a block.
        shifts: the bit at which each piece of a tile begins.
    """

    low: int
    width: int
    first_tile: int
    shifts: tuple[int, ...]


@dataclass(frozen=True)
class WordLayout:
    """How a row of codes is laid out in words.

    Attributes:
        bits: of a code.
        columns: K.
        group_size: columns per scale.
        piece: columns of a piece.
        group_pieces: pieces of a group.
        pieces: of a row, a multiple of ``block_pieces``. Those past the last group are zeros.
    """

    bits: int
    columns: int
    group_size: int
    piece: int
    group_pieces: int
    pieces: int

    @classmethod
    def of(cls, bits: int, columns: int, group_size: int) -> WordLayout:
        """The layout of ``columns`` codes of ``bits``: of those of no more padding than needed, that of the longest pieces."""
        group_size = max(1, min(group_size, columns))
        # Three planes of long pieces would not fit in the registers of a kernel.
        lengths = [piece for piece in PIECES if bits != 7 or piece < max(PIECES)]
        layouts = [cls._with_piece(bits, columns, group_size, piece) for piece in lengths]
        shortest = min(layout.padded_columns for layout in layouts)
        return next(layout for layout in layouts if layout.padded_columns <= MAX_PADDING * shortest)

    @classmethod
    def _with_piece(cls, bits: int, columns: int, group_size: int, piece: int) -> WordLayout:
        group_pieces = -(-group_size // piece)
        block = WORD_BITS // _narrowest(bits)
        pieces = -(-group_count(columns, group_size) * group_pieces // block) * block
        return cls(bits, columns, group_size, piece, group_pieces, pieces)

    @property
    def padded_columns(self) -> int:
        """Columns that a row takes, padding included."""
        return self.pieces * self.piece

    @property
    def block_pieces(self) -> int:
        """Pieces of a block: 2, 4, 8 or 16."""
        return WORD_BITS // _narrowest(self.bits)

    @property
    def widest(self) -> int:
        """Bits of the widest plane."""
        return 1 << (self.bits.bit_length() - 1)

    @property
    def block_tiles(self) -> int:
        """Tiles of a block."""
        return self.bits // _narrowest(self.bits)

    @property
    def row_words(self) -> int:
        """Words of a row."""
        return self.padded_columns * self.bits // WORD_BITS

    @property
    def planes(self) -> Iterator[Plane]:
        """The planes, the widest first."""
        high = self.bits
        for width in (8, 4, 2, 1):
            if self.bits & width:
                yield Plane(high - width, width, (self.bits - high) // _narrowest(self.bits), _shifts(width, self.widest))
                high -= width


def _narrowest(bits: int) -> int:
    """The width of the narrowest plane of codes of ``bits``: the lowest bit that is set in the number."""
    return bits & -bits


def _shifts(width: int, widest: int) -> tuple[int, ...]:
    """At which bit of a word of a plane each piece begins."""
    slots = WORD_BITS // widest
    return tuple(8 * (slot % 2) + widest * (slot // 2) + width * part for part in range(widest // width) for slot in range(slots))


def pad_groups(values: Tensor, layout: WordLayout) -> Tensor:
    """``values`` ``[N, K]`` with zeros where the layout has padding, ``[N, padded_columns]``."""
    if layout.padded_columns == layout.columns:
        return values
    rows, groups = values.size(0), group_count(layout.columns, layout.group_size)
    values = functional.pad(values, (0, groups * layout.group_size - layout.columns)).view(rows, groups, layout.group_size)
    values = functional.pad(values, (0, layout.group_pieces * layout.piece - layout.group_size)).flatten(1)
    return functional.pad(values, (0, layout.padded_columns - values.size(1)))


def pack_words(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Pack uint8 ``codes`` ``[N, K]``, each below ``2 ** bits``, into int16 words ``[N, row_words]``."""
    layout = WordLayout.of(bits, codes.size(1), group_size)
    rows, codes = codes.size(0), pad_groups(codes, layout)
    words = codes.new_empty((rows, layout.pieces // layout.block_pieces, layout.block_tiles, layout.piece), dtype=torch.int16)
    for plane, tiles in _tiles(words, layout):
        field = ((codes >> plane.low) & (2**plane.width - 1)).view(*tiles.shape[:-1], WORD_BITS // plane.width, layout.piece)
        tiles.zero_()
        for i, shift in enumerate(plane.shifts):
            tiles |= field[..., i, :].to(torch.int16) << shift
    return words.flatten(1)


def unpack_words(words: Tensor, bits: int, columns: int, group_size: int) -> Tensor:
    """The inverse of :func:`pack_words`: uint8 codes ``[N, columns]``."""
    layout = WordLayout.of(bits, columns, group_size)
    rows, groups = words.size(0), group_count(columns, layout.group_size)
    words = words.view(rows, layout.pieces // layout.block_pieces, layout.block_tiles, layout.piece)
    codes = torch.zeros(rows, layout.padded_columns, dtype=torch.uint8, device=words.device)
    for plane, tiles in _tiles(words, layout):
        shifts = torch.tensor(plane.shifts, dtype=torch.int16, device=words.device)
        field = (tiles.unsqueeze(-2) >> shifts.unsqueeze(-1)) & (2**plane.width - 1)
        codes |= field.reshape(codes.shape).to(torch.uint8) << plane.low
    width = layout.group_pieces * layout.piece
    return codes[:, : groups * width].reshape(rows, groups, width)[..., : layout.group_size].flatten(1)[:, :columns]


def _tiles(words: Tensor, layout: WordLayout) -> Iterator[tuple[Plane, Tensor]]:
    """Each plane and its part of ``words`` ``[N, blocks, block_tiles, piece]``."""
    for plane in layout.planes:
        count = layout.block_pieces * plane.width // WORD_BITS
        yield plane, words[:, :, plane.first_tile : plane.first_tile + count]
