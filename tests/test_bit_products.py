"""Products that count bits, on every instruction set that this machine runs: against float64, and against the int8 kernels."""

from __future__ import annotations

import struct

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_cpu_products import (
    DTYPES,
    EXAMPLES,
    ISAS,
    Weight,
    assert_linear_accurate,
    bit_widths,
    dtypes,
    forced,
    groups,
    isa,
    sizes,
    strided,
)
from torch import nn

import kbit_inductor
from kbit_inductor import LayerConfig
from kbit_inductor.kernels import layout, reference
from kbit_inductor.lowering import registry
from kbit_inductor.lowering.registry import Problem, choose
from kbit_inductor.packing import operand_specs, pack
from kbit_inductor.testing import relative_error

__all__ = ["isa"]  # a fixture
relaxed = settings(max_examples=EXAMPLES // 2)
HEADER = struct.Struct("<IBBBBfIqqq")
MAGIC = int.from_bytes(b"KBT1", "little")
FIELDS = ("magic", "bits", "symmetric", "codebook", "vectors", "global_scale", "padding", "rows", "columns", "group_size")


def vectors(weight, codes=None, scale=None):
    """The weight as bit vectors."""
    grid = (weight.scale if scale is None else scale, weight.offset, weight.global_scale)
    return torch.ops.kbit.tile_cpu(weight.codes if codes is None else codes, *grid, weight.bits, weight.group_size, None, True)


def linear(x, packed, weight, bias=None, activation_bits=1):
    return torch.ops.kbit.linear_cpu(x, packed, bias, weight.rows, activation_bits)


@relaxed
@given(
    isa=st.sampled_from(ISAS),
    batch=st.one_of(st.integers(0, 20), st.sampled_from([127, 131])),
    rows=st.one_of(st.integers(0, 40), st.sampled_from([63, 100])),
    columns=sizes,
    bits=bit_widths,
    group_size=groups,
    with_offset=st.booleans(),
    activation_bits=st.sampled_from([1, 1, 2, 3, 4, 5, 6, 7, 8, 16]),
    dtype=dtypes,
    bias_dtype=st.one_of(st.none(), dtypes),
    how=st.sampled_from(["plain", "transposed", "sliced", "expanded", "vector"]),
    seed=st.integers(0, 2**31),
)
def test_linear_matches_float64(
    isa, batch, rows, columns, bits, group_size, with_offset, activation_bits, dtype, bias_dtype, how, seed
):
    torch.manual_seed(seed)
    weight = Weight(rows, columns, bits, group_size, with_offset, -bits)
    x = strided(torch.randn(max(batch, 1) if how == "expanded" else batch, columns).to(dtype), how)
    bias = None if bias_dtype is None else torch.randn(rows).to(bias_dtype)
    with forced(isa):
        assert_linear_accurate(x, weight, bias, activation_bits, vectors(weight))


@pytest.mark.parametrize("activation_bits", range(1, 9))
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_integers_are_exact(isa, bits, activation_bits):
    """Scales of one, and activations that are their own codes: nothing is rounded, so nothing may differ from the product."""
    largest = 2 ** (activation_bits - 1) - 1
    for batch, columns, group_size in ((1, 256, 64), (2, 100, 33), (19, 131, 128), (5, 200, 200)):
        weight = Weight(21, columns, bits, group_size, with_offset=False)
        packed = vectors(weight, scale=torch.full_like(weight.scale, 2))  # 2, since the levels of one bit are +-scale/2
        x = (
            torch.randint(0, 2, (batch, columns)).mul(2).sub(1)
            if not largest
            else torch.randint(-largest, largest + 1, (batch, columns))
        )
        x[:, torch.arange(columns) % group_size % reference.SEGMENT == 0] = max(largest, 1)  # so that the step is one
        centred = 2 * weight.codes.double() - 2 * layout.midpoint(bits)
        assert torch.equal(linear(x.float(), packed, weight, None, activation_bits).double(), x.double() @ centred.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 31, 32, 64, 200, 300])
def test_both_layouts_hold_the_same_weight(isa, group_size, dtype):
    for bits in range(1, 9):
        weight = Weight(37, 300, bits, group_size, bits % 2 == 0)
        packed = vectors(weight)
        assert packed.numel() == layout.tiled_nbytes(37, 300, bits, group_size, bits % 2 == 1, vectors=True)
        for ours, theirs in zip(torch.ops.kbit.untile_cpu(packed), torch.ops.kbit.untile_cpu(weight.tiled), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(torch.ops.kbit.dequantize_cpu(packed, 3, 37), weight.dense(torch.float32)[3:])
        indices = torch.tensor([[0, 36], [5, 5]])
        rows = (torch.ops.kbit.embedding_cpu(indices, each, 300, dtype) for each in (packed, weight.tiled))
        assert torch.equal(*rows)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation_bits", [1, 2, 4])
def test_what_is_no_number_stays_in_its_row(isa, poison, activation_bits):
    """As the int8 kernels give it."""
    weight = Weight(13, 70, 2, 32)
    packed, x = vectors(weight), torch.randn(9, 70)
    clean = linear(x, packed, weight, None, activation_bits)
    x[1, 69] = poison
    out = linear(x, packed, weight, None, activation_bits)
    others = torch.arange(9) != 1
    assert torch.equal(out[others], clean[others]) and not out[1].isfinite().any()
    torch.testing.assert_close(out[1], linear(x, weight.tiled, weight, None, activation_bits)[1], rtol=0, atol=0, equal_nan=True)


def test_weights_of_both_layouts_in_one_call(isa):
    """Fused products take a weight of either layout: siblings, a gate, norm and residual sum."""
    first, second = Weight(32, 96, 1, 32), Weight(32, 96, 4, 32)
    x, norm = torch.randn(3, 96), torch.rand(96)
    fused = torch.ops.kbit.fused_linear_cpu
    for activation, gated, residual in (("", False, None), ("silu", True, torch.randn(3, 32))):
        ours, theirs = (
            fused(x, norm, 1e-6, list(weights), [None, None], [32, 32], activation, gated, residual, 2)
            for weights in ((vectors(first), second.tiled), (first.tiled, second.tiled))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("x_needs_grad", [False, True])
def test_opcheck(x_needs_grad):
    config = LayerConfig(2, 16)
    packed = pack(torch.randn(7, 40), config, layout="vectors")
    x = torch.randn(3, 40, requires_grad=x_needs_grad)
    torch.library.opcheck(torch.ops.kbit.linear_cpu.default, (x, packed.operands[0], torch.randn(7), 7, 2))
    shape, dtype = operand_specs(7, 40, config, "vectors")[0]
    assert (packed.operands[0].shape, packed.operands[0].dtype) == (shape, dtype)
    assert packed.nbytes == packed.operands[0].numel()
    assert torch.equal(packed.dequantize(), torch.ops.kbit.dequantize_cpu(packed.operands[0], 0, 7))


def test_codebooks_and_bit_vectors_exclude_each_other():
    weight = Weight(4, 8, 2, 8, codebook=True)
    grid = (weight.scale, weight.offset, weight.global_scale)
    with pytest.raises(RuntimeError, match="give no codebook"):
        torch.ops.kbit.tile_cpu(weight.codes, *grid, 2, 8, weight.codebook, True)


# --- the choice ------------------------------------------------------------------------------------------------------


def problem(**changes):
    return Problem(**{"family": "linear", "device": "cpu", "dtype": torch.float32, "rows": 64, "columns": 64, "bits": 1,
                      "group_size": 64, "activation_bits": 1, **changes})  # fmt: skip


def test_few_pairs_of_bits_are_counted_and_many_multiplied(isa):
    limit = registry.BIT_PAIRS[isa]
    for bits in range(1, 9):
        for activation_bits in (*range(1, 9), 16):
            choice = choose(problem(bits=bits, activation_bits=activation_bits))
            counted = activation_bits <= registry.MAX_BIT_VECTORS and bits * activation_bits <= limit
            assert choice.kernel.name == ("bits" if counted else "cpu")
            assert dict(choice.rejected)["cpu" if counted else "bits"]


def test_what_bit_vectors_do_not_take_is_told():
    assert "codebook" in dict(choose(problem(bits=2, uniform=False)).rejected)["bits"]
    assert "activation_bits" in dict(choose(problem(activation_bits=8)).rejected)["bits"]
    assert "float64" in dict(choose(problem(dtype=torch.float64)).rejected)["bits"]
    assert choose(problem(group_size=4)).kernel.name == "cpu"  # a word for four columns


@pytest.mark.parametrize(("bits", "activation_bits", "kernel"), [(1, 1, "bits"), (1, 2, "bits"), (8, 4, "cpu"), (1, 8, "cpu")])
def test_the_option_chooses_the_kernel_and_not_the_numbers(bits, activation_bits, kernel, monkeypatch):
    model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    x, options = torch.randn(5, 256), {"bits": bits, "activation_bits": activation_bits}
    with torch.no_grad():
        report = kbit_inductor.explain(model, x, config=kbit_inductor.Config(**options))
        assert [layer.kernels for layer in report.layers] == [(kernel,)] * 2
        y = torch.compile(model, backend="kbit", options=options)(x)
        torch._dynamo.reset()
        monkeypatch.setattr(registry, "KERNELS", [each for each in registry.KERNELS if each.name != "bits"])
        assert relative_error(y, torch.compile(model, backend="kbit", options=options)(x)) < 1e-5


# --- damaged headers -------------------------------------------------------------------------------------------------

extents = st.one_of(st.integers(0, 200), st.integers(-(2**63), 2**63 - 1), st.integers(0, 62).map(lambda n: 2**n))
small = st.one_of(st.integers(0, 9), st.integers(0, 255))


@settings(max_examples=300)
@given(
    layout_name=st.sampled_from(["tiled", "vectors"]),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "bits": small,
            "symmetric": small,
            "codebook": small,
            "vectors": small,
            "rows": extents,
            "columns": extents,
            "group_size": extents,
        },
    ),
)
def test_a_damaged_header_is_an_error_and_not_a_read_out_of_bounds(layout_name, changes):
    packed = pack(torch.zeros(20, 70), LayerConfig(3, 16), layout=layout_name).operands[0].clone()
    before = dict(zip(FIELDS, HEADER.unpack(bytes(packed[: HEADER.size].tolist())), strict=True))
    after = {**before, **changes}
    packed[: HEADER.size] = torch.tensor(list(HEADER.pack(*after.values())), dtype=torch.uint8)
    try:
        codes, *_ = torch.ops.kbit.untile_cpu(packed)
    except RuntimeError as error:
        assert "packed weight" in str(error)
    else:  # what it says fits the bytes, so all of it can be read
        assert codes.shape == (after["rows"], after["columns"])
        sizes_told = (after["rows"], after["columns"], after["bits"], after["group_size"])
        told = layout.tiled_nbytes(*sizes_told, bool(after["symmetric"]), bool(after["codebook"]), bool(after["vectors"]))
        assert told == packed.numel()


def test_a_header_whose_size_wraps_around_is_refused():
    """2 ** 27 row blocks of 2 ** 37 bytes are 2 ** 64, which 64 bits cannot tell from nothing."""
    packed = torch.zeros(128, dtype=torch.uint8)
    packed[: HEADER.size] = torch.tensor(list(HEADER.pack(MAGIC, 8, 0, 0, 0, 1.0, 0, 2**31 - 1, 2**30, 1)), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="takes more"):
        torch.ops.kbit.dequantize_cpu(packed, 0, 1)
