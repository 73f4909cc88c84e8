"""The CPU's products, on every instruction set that this machine runs, against float64, with bounds that follow from the method."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import fusions
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from threads import with_threads

from kbit_inductor.kernels import layout, reference
from kbit_inductor.kernels.cpu import build, compiler

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = int(os.environ.get("KBIT_TEST_EXAMPLES", "150"))
UNIT_ROUNDOFF = 2.0**-24  # of float32
ACTIVATIONS = {"": lambda x: x, **fusions.ACTIVATIONS}
build.load()
ISAS = torch.ops.kbit.isas_cpu()


@pytest.fixture(params=ISAS)
def isa(request):
    with forced(request.param):
        yield request.param


class forced:
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        torch.ops.kbit.force_isa_cpu(self.name)

    def __exit__(self, *error: object) -> None:
        torch.ops.kbit.force_isa_cpu("")


class Weight:
    """A random packed weight ``[rows, columns]`` in both layouts."""

    def __init__(self, rows, columns, bits, group_size, with_offset=True, exponent=0, codebook=False):
        groups = layout.group_count(columns, group_size)
        self.rows, self.columns, self.bits, self.group_size = rows, columns, bits, group_size
        self.codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
        self.scale = (torch.rand(rows, groups) + 0.1).half()
        self.offset = torch.randn(rows, groups).half() * 2**bits if with_offset else None
        self.global_scale = torch.tensor([2.0**exponent])
        self.codebook = random_codebook(bits) if codebook and layout.takes_codebook(bits) else None
        grid = (self.scale, self.offset, self.global_scale)
        self.planes = (layout.pack_codes(self.codes, bits), *grid)
        self.tiled = torch.ops.kbit.tile_cpu(self.codes, *grid, bits, group_size, self.codebook)

    def dense(self, dtype=torch.float64):
        return reference.dequantize(*self.planes, self.columns, self.group_size, dtype, self.codebook)

    def magnitude(self):
        """What a kernel adds up: levels about their middle, and the middle, without the cancellation between the two."""
        group = torch.arange(self.columns) // self.group_size
        level_bits = layout.level_bits(self.bits, self.codebook is not None)
        levels = (self.codes if self.codebook is None else self.codebook[self.codes.int()]).double()
        middle = 2 ** (level_bits - 1)
        scale = self.scale.double()[:, group]
        zero = -scale * layout.midpoint(level_bits) if self.offset is None else self.offset.double()[:, group]
        return (scale * (levels - middle).abs() + (zero + scale * middle).abs()) * self.global_scale.double()


def random_codebook(bits):
    return torch.randperm(256)[: 2**bits].sort().values.to(torch.uint8)


def assert_accurate(y, exact, magnitude, terms):
    """``|y - exact|`` against the a-priori bound of a float32 sum of ``terms`` (Higham, 2002, section 3.1), then one rounding."""
    summed = 2 * (terms + 8) * UNIT_ROUNDOFF * magnitude
    info = torch.finfo(y.dtype)
    rounded = info.eps / 2 * (exact.abs() + summed) + info.smallest_normal * info.eps
    assert y.shape == exact.shape and y.is_contiguous()
    assert ((y.double() - exact).abs() <= summed + rounded).all()


def assert_linear_accurate(x, weight, bias=None, activation_bits=16, packed=None):
    """``packed``: the weight in another layout than in tiles of quads."""
    y = torch.ops.kbit.linear_cpu(x, weight.tiled if packed is None else packed, bias, weight.rows, activation_bits)
    rows = x.reshape(math.prod(x.shape[:-1]), weight.columns)
    rounded = reference.round_activations(rows, weight.group_size, activation_bits)
    exact, magnitude = rounded @ weight.dense().t(), rounded.abs() @ weight.magnitude().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    shape = (*x.shape[:-1], weight.rows)
    assert y.dtype == x.dtype
    assert_accurate(y, exact.view(shape), magnitude.view(shape), weight.columns)


def strided(x, how):
    """The same kind of activations with other strides; the last dimension stays K."""
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "sliced":
        return torch.randn(x.size(0), 2 * x.size(1) + 1).to(x.dtype)[:, 1::2]
    if how == "expanded":
        return x[:1].expand(3, 2, x.size(1))
    if how == "vector":
        return torch.randn(x.size(1)).to(x.dtype)
    return x


sizes = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129]), st.integers(0, 300))
groups = st.one_of(st.sampled_from([16, 32, 64, 128, 1000]), st.integers(1, 300))
bit_widths = st.integers(1, 8)
dtypes = st.sampled_from(DTYPES)
relaxed = settings(max_examples=EXAMPLES)


@relaxed
@given(
    isa=st.sampled_from(ISAS),
    batch=st.one_of(st.integers(0, 20), st.sampled_from([127, 128, 131])),
    rows=st.one_of(st.integers(0, 40), st.sampled_from([63, 100])),
    columns=sizes,
    bits=bit_widths,
    group_size=groups,
    with_offset=st.booleans(),
    activation_bits=st.one_of(st.just(8), st.just(16), st.integers(1, 8)),
    dtype=dtypes,
    bias_dtype=st.one_of(st.none(), dtypes),
    how=st.sampled_from(["plain", "transposed", "sliced", "expanded", "vector"]),
    exponent=st.integers(-6, 2),
    codebook=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_linear_matches_float64(
    isa, batch, rows, columns, bits, group_size, with_offset, activation_bits, dtype, bias_dtype, how, exponent, codebook, seed
):
    torch.manual_seed(seed)
    weight = Weight(rows, columns, bits, group_size, with_offset, exponent - bits, codebook)
    x = strided(torch.randn(max(batch, 1) if how == "expanded" else batch, columns).to(dtype), how)
    bias = None if bias_dtype is None else torch.randn(rows).to(bias_dtype)
    with forced(isa):
        assert_linear_accurate(x, weight, bias, activation_bits)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 16, 17, 300])
def test_every_batch_and_width(isa, batch, bits):
    torch.manual_seed(batch)
    weight = Weight(37, 260, bits, 64)
    for activation_bits in (8, 16):
        assert_linear_accurate(torch.randn(batch, 260), weight, torch.randn(37), activation_bits)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 17])
def test_codebooks_of_every_width(isa, batch, bits):
    torch.manual_seed(bits)
    for group_size, dtype, with_offset in ((32, torch.float32, True), (20, torch.bfloat16, False), (260, torch.float16, True)):
        weight = Weight(37, 260, bits, group_size, with_offset, -bits, codebook=True)
        for activation_bits in (8, 16):
            assert_linear_accurate(torch.randn(batch, 260).to(dtype), weight, torch.randn(37), activation_bits)


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("batch", [1, 17])
def test_the_codebook_of_all_codes_in_order_is_no_codebook(isa, batch, bits):
    """Scales and offsets that make the sums exact: levels about 128 and codes about their own middle then give the same bits."""
    codes, scale, one = torch.randint(0, 2**bits, (40, 96), dtype=torch.uint8), torch.ones(40, 3).half(), torch.ones(1)
    grid = (codes, scale, torch.full((40, 3), -3.0).half(), one, bits, 32)
    x = torch.randint(-8, 9, (batch, 96)).float()
    plain, looked_up = (
        torch.ops.kbit.linear_cpu(x, torch.ops.kbit.tile_cpu(*grid, codebook), None, 40, 16)
        for codebook in (None, torch.arange(2**bits, dtype=torch.uint8))
    )
    assert torch.equal(plain, looked_up) and torch.equal(plain, x @ (codes.float() - 3).t())


@pytest.mark.parametrize("columns", [64, 96, 100, 256, 512, 1000])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, 20])
@pytest.mark.parametrize("with_offset", [False, True])
def test_one_bit_looked_up_and_multiplied(isa, columns, group_size, with_offset):
    """One row of x may be looked up in a table of partial sums, several never are: both give the same."""
    torch.manual_seed(columns)
    weight = Weight(40, columns, 1, group_size, with_offset)
    x = torch.randn(3, columns)
    for activation_bits in (1, 4, 8, 16):
        assert_linear_accurate(x[:1], weight, None, activation_bits)
        one = torch.ops.kbit.linear_cpu(x[:1], weight.tiled, None, 40, activation_bits)
        three = torch.ops.kbit.linear_cpu(x, weight.tiled, None, 40, activation_bits)
        torch.testing.assert_close(one, three[:1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_bits_are_about_as_good_as_the_dtype(dtype):
    """Of the largest activation of a segment, the rounding under activation_bits=16 is one unit in the last place or less."""
    x = torch.randn(64, 512).to(dtype)
    error = (reference.round_activations(x, 64, 16) - x.double()).abs().amax(1)
    assert (error <= x.double().abs().amax(1) * torch.finfo(dtype).eps * 1.01).all()  # 1.01: 127 * 2**16 steps, not 2**23


@pytest.mark.parametrize("bits", range(1, 9))
def test_identity_reads_back_every_weight(isa, bits):
    weight = Weight(11, 77, bits, 20)
    out = torch.ops.kbit.linear_cpu(torch.eye(77), weight.tiled, None, 11, 16)
    torch.testing.assert_close(out.t(), weight.dense(torch.float32), rtol=1e-6, atol=1e-5)
    assert torch.equal(torch.ops.kbit.dequantize_cpu(weight.tiled, 0, 11), weight.dense(torch.float32))
    assert torch.equal(torch.ops.kbit.dequantize_cpu(weight.tiled, 3, 7), weight.dense(torch.float32)[3:7])


def test_instruction_sets_agree_bit_for_bit_on_integers():
    """Integer activations and scales of one: all sums are exact, so nothing may differ."""
    weight = Weight(40, 300, 5, 128, with_offset=False)
    weight.tiled = torch.ops.kbit.tile_cpu(weight.codes, torch.ones_like(weight.scale), None, torch.ones(1), 5, 128)
    x = torch.randint(-8, 9, (6, 300)).float()
    results = []
    for name in ISAS:
        with forced(name):
            results.append(torch.ops.kbit.linear_cpu(x, weight.tiled, None, 40, 16))
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], x @ (weight.codes.float() - 16).t())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("batch", [2, 9, 40])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_what_is_no_number_stays_in_its_row(poison, batch, activation_bits):
    weight = Weight(13, 70, 4, 32)
    x = torch.randn(batch, 70)
    clean = torch.ops.kbit.linear_cpu(x, weight.tiled, None, 13, activation_bits)
    x[1, 69] = poison
    out = torch.ops.kbit.linear_cpu(x, weight.tiled, None, 13, activation_bits)
    expected = x[1] @ weight.dense(torch.float32).t()
    assert torch.equal(out[1].isnan(), expected.isnan())
    assert torch.equal(out[1][~expected.isnan()], expected[~expected.isnan()])
    others = torch.arange(batch) != 1
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1e-30, 1e20, 1e30, 1e36])
def test_extreme_magnitudes(value, batch):
    """As in float: what underflows is as small as it was, and nothing overflows on the way."""
    weight = Weight(13, 70, 4, 32, exponent=-4)
    x = torch.randn(batch, 70).clamp(-3, 3) * value
    out = torch.ops.kbit.linear_cpu(x, weight.tiled, None, 13, 8)
    exact = x.double() @ weight.dense().t()
    assert out.isfinite().all()
    assert ((out.double() - exact).abs() <= 0.05 * exact.abs().max() + 1e-27).all()


def test_poison_beside_x_is_not_read():
    weight = Weight(13, 70, 4, 32, with_offset=False)
    x = torch.full((3, 100), float("nan"))
    x[:, :70] = 1
    assert torch.ops.kbit.linear_cpu(x[:, :70], weight.tiled, None, 13, 16).isfinite().all()


def test_result_does_not_depend_on_the_number_of_threads():
    weight = Weight(300, 300, 4, 64)
    x = torch.randn(3, 300)
    arguments = torch.ops.kbit.linear_cpu, x, weight.tiled, None, 300, 8
    assert torch.equal(with_threads(1, *arguments), with_threads(2, *arguments))


def test_sixteen_threads_at_once():
    weight = Weight(64, 128, 3, 32)
    x = torch.randn(5, 128)
    expected = torch.ops.kbit.linear_cpu(x, weight.tiled, None, 64, 8)
    wrong = []

    def call():
        for _ in range(20):
            if not torch.equal(torch.ops.kbit.linear_cpu(x, weight.tiled, None, 64, 8), expected):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["portable", "z80"])
def test_an_instruction_set_is_named_by_the_environment(name):
    code = "import torch, kbit_inductor; from kbit_inductor.kernels.cpu import build; build.load(); print(torch.ops.kbit.isa_cpu())"
    environment = os.environ | {"KBIT_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    if name in ISAS:
        assert done.stdout.strip() == name
    else:
        known = ", ".join(reversed(compiler.instruction_sets()))
        assert f"KBIT_ISA is 'z80', which this machine does not run; it runs {', '.join(ISAS)} (of {known})" in done.stderr


# --- what is fused around the product --------------------------------------------------------------------------------


@relaxed
@given(
    isa=st.sampled_from(ISAS),
    batch=st.integers(1, 20),
    columns=st.integers(1, 150),
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    bits=st.lists(bit_widths, min_size=4, max_size=4),
    codebooks=st.lists(st.booleans(), min_size=4, max_size=4),
    dtype=dtypes,
    wanted=st.none() | dtypes,
    added=dtypes,
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
    with_norm=st.booleans(),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fused_is_the_sum_of_its_parts(
    isa, batch, columns, rows, bits, codebooks, dtype, wanted, added, activation, gated, with_norm, with_bias, with_residual, seed
):
    torch.manual_seed(seed)
    if gated:
        rows = [rows[0], rows[0]]
    weights = [
        Weight(n, columns, k, 64, exponent=-8 if book else -k, codebook=book)
        for n, k, book in zip(rows, bits, codebooks, strict=False)
    ]
    x = torch.randn(2, batch, columns).to(dtype)
    norm = torch.rand(columns).to(dtype) if with_norm else None
    biases = [torch.randn(n).to(dtype) if with_bias else None for n in rows]
    width = sum(rows) // (2 if gated else 1)
    residual = torch.randn(2, batch, width).to(added) if with_residual else None
    with forced(isa):
        y = torch.ops.kbit.fused_linear_cpu(
            x, norm, 1e-5, [w.tiled for w in weights], biases, rows, activation, gated, residual, 16, wanted
        )
    source = x.double() if norm is None else torch.nn.functional.rms_norm(x.double(), (columns,), norm.double(), 1e-5)
    parts = [source @ w.dense().t() + (0 if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    magnitude = [source.abs() @ w.magnitude().t() + 3 for w in weights]
    act = ACTIVATIONS[activation]
    expected = act(parts[0]) * parts[1] if gated else act(torch.cat(parts, -1))
    scale = magnitude[0] * magnitude[1] if gated else torch.cat(magnitude, -1)
    if residual is not None:
        expected, scale = expected + residual.double(), scale + residual.double().abs()
    assert y.dtype == (wanted or dtype) and y.shape == expected.shape
    # Activations are 24 or 16 bits of their segment's largest; their slopes are below 1.2; sums as in assert_accurate.
    block = 2.0**-22 if dtype == torch.float32 else 2.0**-14
    bound = (8 * (columns + 16) * UNIT_ROUNDOFF + 8 * block) * scale + torch.finfo(y.dtype).eps * expected.abs()
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_over_their_whole_range(activation):
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 1e4, -1e4])])
    weight = Weight(1, 1, 8, 1)
    weight.tiled = torch.ops.kbit.tile_cpu(
        torch.tensor([[1]], dtype=torch.uint8), torch.ones(1, 1).half(), torch.zeros(1, 1).half(), torch.ones(1), 8, 1
    )
    y = torch.ops.kbit.fused_linear_cpu(values[:, None], None, 0.0, [weight.tiled], [None], [1], activation, False, None, 16)
    expected = ACTIVATIONS[activation](values.double())
    assert ((y[:, 0].double() - expected).abs() <= 1e-6 * values.double().abs().clamp(min=1)).all()


# --- embedding and tiling --------------------------------------------------------------------------------------------


@relaxed
@given(
    isa=st.sampled_from(ISAS),
    rows=st.integers(1, 40),
    columns=st.one_of(sizes, st.just(1100)),
    bits=bit_widths,
    group_size=groups,
    with_offset=st.booleans(),
    dtype=dtypes,
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    shape=st.sampled_from([(), (0,), (1,), (5,), (2, 3)]),
    codebook=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_embedding_equals_the_reference(
    isa, rows, columns, bits, group_size, with_offset, dtype, index_dtype, shape, codebook, seed
):
    torch.manual_seed(seed)
    weight = Weight(rows, columns, bits, group_size, with_offset, -bits, codebook)
    indices = torch.randint(0, rows, shape, dtype=index_dtype)
    with forced(isa):
        out = torch.ops.kbit.embedding_cpu(indices, weight.tiled, columns, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, reference.embedding(indices, *weight.planes, columns, group_size, dtype, weight.codebook))


@pytest.mark.parametrize("index", [-1, 5, 2**40, -(2**40)])
def test_embedding_index_out_of_range(index):
    weight = Weight(5, 16, 4, 16)
    with pytest.raises(IndexError, match="out of range"):
        torch.ops.kbit.embedding_cpu(torch.tensor([0, index]), weight.tiled, 16, torch.float32)


@relaxed
@given(
    isa=st.sampled_from(ISAS), rows=st.integers(0, 40), columns=sizes, bits=bit_widths, group_size=groups,
    with_offset=st.booleans(), codebook=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_untile_inverts_tile(isa, rows, columns, bits, group_size, with_offset, codebook, seed):
    torch.manual_seed(seed)
    weight = Weight(rows, columns, bits, group_size, with_offset, codebook=codebook)
    has_codebook = weight.codebook is not None
    assert weight.tiled.numel() == layout.tiled_nbytes(rows, columns, bits, group_size, not with_offset, has_codebook)
    assert weight.tiled.data_ptr() % 64 == 0
    with forced(isa):
        codes, scale, offset, global_scale, levels = torch.ops.kbit.untile_cpu(weight.tiled)
    assert torch.equal(codes, weight.codes) and torch.equal(scale, weight.scale) and torch.equal(global_scale, weight.global_scale)
    assert torch.equal(offset, weight.offset) if with_offset else offset.shape[0] == 0
    assert torch.equal(levels, weight.codebook) if has_codebook else levels.shape == (0,)


def test_the_layout_is_as_described():
    """Bit 4 * row + column of a word, most significant word first (kernels/cpu/tiled.h)."""
    codes = torch.zeros(16, 8, dtype=torch.uint8)
    codes[5, 6] = 0b10
    tiled = torch.ops.kbit.tile_cpu(codes, torch.ones(16, 1).half(), None, torch.ones(1), 2, 8)
    words = tiled[64 + 32 : 64 + 32 + 2 * 2 * 8].view(2, 2, 8)  # quads, bits, bytes
    bit = 4 * 5 + 2
    assert int(words[1, 0, bit // 8]) == 1 << bit % 8
    words[1, 0, bit // 8] = 0
    assert not words.any()


@settings(max_examples=300)
@given(
    place=st.integers(0, 47), value=st.integers(0, 255), cut=st.one_of(st.none(), st.integers(0, 700)), bits=st.integers(2, 7),
    codebook=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_damaged_packed_weight_is_refused_or_harmless(place, value, cut, bits, codebook, seed):
    """No header makes a kernel read or write out of bounds: it raises, or it computes with the weight that the header describes."""
    torch.manual_seed(seed)
    tiled = Weight(20, 40, bits, 16, codebook=codebook).tiled.clone()
    tiled[place] = value
    if cut is not None:
        tiled = tiled[:cut].clone()
    x = torch.randn(2, 40)
    try:
        y = torch.ops.kbit.linear_cpu(x, tiled, None, 20, 8)
    except RuntimeError as error:
        assert "packed weight" in str(error)
        return
    assert y.shape == (2, 20)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_header_may_claim_a_codebook_at_2_to_7_bits_only(bits):
    tiled = Weight(20, 40, bits, 16).tiled
    tiled[6] = 1
    with pytest.raises(RuntimeError, match="takes .* bytes" if layout.takes_codebook(bits) else "damaged"):
        torch.ops.kbit.linear_cpu(torch.randn(2, 40), tiled, None, 20, 8)


def _operands(**changes):
    valid = dict(x=torch.randn(2, 40), weight=Weight(6, 40, 4, 16).tiled, bias=torch.randn(6), rows=6, activation_bits=8)
    return tuple((valid | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.randn(2, 41)), "x has 41 columns"),
        (dict(x=torch.tensor(1.0)), "x must be"),
        (dict(x=torch.randn(2, 40, dtype=torch.float64)), "x must be float32"),
        (dict(weight=torch.zeros(4, 6, 5)), "must be a contiguous uint8 vector"),
        (dict(weight=torch.zeros(10, dtype=torch.uint8)), "has no header"),
        (dict(weight=torch.zeros(1000, dtype=torch.uint8)), "no packed weight"),
        (dict(rows=5), "has 6 rows, not 5"),
        (dict(bias=torch.randn(5)), "bias must have shape"),
        (dict(bias=torch.zeros(6, dtype=torch.int32)), "bias must be"),
        (dict(activation_bits=0), "activation_bits"),
        (dict(activation_bits=9), "activation_bits"),
    ],
)
def test_wrong_operands_of_linear_raise(changes, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kbit.linear_cpu(*_operands(**changes))


def _fused_operands(**changes):
    weight = Weight(6, 40, 4, 16).tiled
    valid = dict(
        x=torch.randn(2, 40), norm_weight=None, eps=0.0, weights=[weight, weight], biases=[None, None], rows=[6, 6],
        activation="", gated=False, residual=None, activation_bits=8, dtype=None,
    )  # fmt: skip
    return tuple((valid | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(norm_weight=torch.ones(41)), "norm_weight must have shape"),
        (dict(norm_weight=torch.ones(40).half()), "norm_weight must be"),
        (dict(weights=[], biases=[], rows=[]), "at least 1"),
        (dict(rows=[6]), "same length"),
        (dict(biases=[None]), "same length"),
        (dict(activation="softmax"), "unknown"),
        (dict(residual=torch.ones(2, 6)), "residual must have shape"),
        (dict(residual=torch.ones(2, 12).double()), "residual must be"),
        (dict(dtype=torch.float64), "dtype must be"),
        (dict(gated=True, weights=[Weight(6, 40, 4, 16).tiled, Weight(5, 40, 4, 16).tiled], rows=[6, 5]), "same rows"),
        (dict(weights=[Weight(6, 40, 4, 16).tiled, Weight(6, 40, 4, 8).tiled]), "share a group size"),
    ],
)
def test_wrong_operands_of_fused_linear_raise(changes, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kbit.fused_linear_cpu(*_fused_operands(**changes))


def test_wrong_operands_of_the_others_raise():
    weight = Weight(5, 16, 4, 16)
    with pytest.raises(RuntimeError, match="indices must be"):
        torch.ops.kbit.embedding_cpu(torch.tensor([0.0]), weight.tiled, 16, torch.float32)
    with pytest.raises(RuntimeError, match="columns, not 24"):
        torch.ops.kbit.embedding_cpu(torch.tensor([0]), weight.tiled, 24, torch.float32)
    with pytest.raises(RuntimeError, match="dtype must be"):
        torch.ops.kbit.embedding_cpu(torch.tensor([0]), weight.tiled, 16, torch.float64)
    with pytest.raises(RuntimeError, match="are not among"):
        torch.ops.kbit.dequantize_cpu(weight.tiled, 3, 6)
    with pytest.raises(RuntimeError, match="scale must have shape"):
        torch.ops.kbit.tile_cpu(weight.codes, weight.scale, weight.offset, weight.global_scale, 4, 8)
    with pytest.raises(RuntimeError, match="bits must be"):
        torch.ops.kbit.tile_cpu(weight.codes, weight.scale, weight.offset, weight.global_scale, 9, 16)
    grid = (weight.codes, weight.scale, weight.offset, weight.global_scale)
    for bits, levels, message in (
        (4, torch.arange(15, dtype=torch.uint8), "codebook must have shape"),
        (4, torch.arange(16), "codebook must be"),
        (4, torch.full((16,), 7, dtype=torch.uint8), "codebook must ascend"),
        (8, torch.arange(256).byte(), "codebooks are of 2 to 7 bits"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.kbit.tile_cpu(*grid, bits, 16, levels)
    with pytest.raises(RuntimeError, match="does not run"):
        torch.ops.kbit.force_isa_cpu("z80")
