"""The layout of words: nothing is lost, nothing is loaded twice, padding is bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kbit_inductor.kernels.words import WordLayout, pack_words, unpack_words

BITS = st.integers(1, 8)


@given(bits=BITS, rows=st.integers(0, 4), columns=st.integers(0, 300), group=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_unpacking_inverts_packing(bits, rows, columns, group, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack_words(codes, bits, group)
    assert words.shape == (rows, WordLayout.of(bits, columns, group).row_words) and words.is_contiguous()
    assert torch.equal(unpack_words(words, bits, columns, group), codes)


@given(bits=BITS, columns=st.integers(1, 5000), group=st.integers(1, 5000))
def test_pieces_straddle_no_group_and_rows_are_aligned(bits, columns, group):
    layout = WordLayout.of(bits, columns, group)
    assert layout.group_pieces * layout.piece >= min(group, columns)
    assert layout.pieces % layout.block_pieces == 0 and layout.padded_columns >= columns
    assert layout.row_words * 2 % 16 == 0  # every row can be read 128 bits at a time
    assert [sum(plane.width for plane in layout.planes), layout.row_words * 16] == [bits, layout.padded_columns * bits]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [32, 64, 128, 4096])
def test_usual_shapes_have_no_padding(bits, group):
    assert WordLayout.of(bits, 4096, group).padded_columns == 4096
    assert WordLayout.of(bits, 4096, group).piece == min(group, 32 if bits == 7 else 64)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_shift_of_a_tile_is_a_piece(bits):
    codes = torch.randint(0, 2**bits, (3, 2048), dtype=torch.uint8)
    layout = WordLayout.of(bits, 2048, 64)
    words = pack_words(codes, bits, 64).view(3, -1, layout.block_tiles, layout.piece)
    for plane in layout.planes:
        assert sorted(plane.shifts) == list(range(0, 16, plane.width))
    for piece in range(layout.pieces):
        block, inside = divmod(piece, layout.block_pieces)
        code = torch.zeros(3, layout.piece, dtype=torch.int16)
        for plane in layout.planes:
            tile, i = divmod(inside, 16 // plane.width)
            field = (words[:, block, plane.first_tile + tile] >> plane.shifts[i]) & (2**plane.width - 1)
            code |= field << plane.low
        assert torch.equal(code.to(torch.uint8), codes[:, piece * layout.piece : (piece + 1) * layout.piece])
