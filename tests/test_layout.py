import torch
from hypothesis import given
from hypothesis import strategies as st

from kbit_inductor.kernels.layout import group_count, midpoint, pack_codes, packed_width, unpack_codes
from kbit_inductor.testing.strategies import BITS, SEEDS


@given(bits=BITS, rows=st.integers(0, 9), columns=st.integers(0, 70), seed=SEEDS)
def test_unpack_inverts_pack(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    planes = pack_codes(codes, bits)
    assert planes.shape == (bits, rows, packed_width(columns))
    assert planes.dtype == torch.uint8
    assert torch.equal(unpack_codes(planes, columns), codes)


@given(bits=BITS, kept=BITS, columns=st.integers(1, 40), seed=SEEDS)
def test_the_first_planes_are_the_leading_bits(bits, kept, columns, seed):
    kept = min(kept, bits)
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(codes, bits)[:kept], columns), codes >> (bits - kept))


def test_columns_past_the_end_are_zero_bits():
    assert pack_codes(torch.full((1, 3), 255, dtype=torch.uint8), 8).flatten().tolist() == [0b111] * 8


def test_group_count_rounds_up():
    assert [group_count(columns, 64) for columns in (0, 1, 64, 65)] == [0, 1, 1, 2]


def test_symmetric_grids_have_a_level_at_zero_but_for_one_bit():
    assert [midpoint(bits) for bits in (1, 2, 8)] == [0.5, 2.0, 128.0]
