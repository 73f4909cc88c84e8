import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import InvalidOptionError, NonFiniteWeightError, UnsupportedDtypeError, UnsupportedShapeError
from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import pack_codes
from kbit_inductor.lowering import registry
from kbit_inductor.packing import operand_specs, pack
from kbit_inductor.quantizers import QUANTIZERS, Format, Statistics, clip, register_quantizer, rtn
from kbit_inductor.quantizers import registry as quantizers
from kbit_inductor.quantizers.compensation import low_rank
from kbit_inductor.testing.strategies import BITS, FLOATS, GROUPS, SEEDS, normal

ALL_NAMES = st.sampled_from(sorted(QUANTIZERS))
DATA_FREE = sorted(name for name, quantizer in QUANTIZERS.items() if quantizer.needs != "hessian")  # the others are "clip" then
NAMES = st.sampled_from(DATA_FREE)


@pytest.fixture(autouse=True, scope="module", params=["compiled", "pytorch"])
def _form(request):
    """Every property holds for both forms; tests/test_cpu_kernels.py compares one with the other."""
    if request.param == "compiled":
        assert registry.cpu_library_problem() is None
        yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "cpu_library_problem", lambda: "not in this test")
            yield


@given(
    bits=BITS, rows=st.integers(0, 8), columns=st.integers(0, 150), group=GROUPS, symmetric=st.booleans(), name=NAMES,
    dtype=FLOATS, seed=SEEDS,
)  # fmt: skip
def test_packed_operands_have_the_promised_shapes_and_finite_values(bits, rows, columns, group, symmetric, name, dtype, seed):
    config = LayerConfig(bits, group, symmetric, name)
    packed = pack(normal((rows, columns), seed, dtype), config)
    assert [(tuple(o.shape), o.dtype) for o in packed.operands] == operand_specs(rows, columns, config, "planes")
    restored = packed.dequantize()
    assert restored.shape == (rows, columns)
    assert torch.isfinite(restored).all()


@given(bits=BITS, columns=st.integers(1, 100), group=GROUPS, seed=SEEDS, exponent=st.integers(-60, 60))
def test_rtn_is_within_half_a_step_of_every_value(bits, columns, group, seed, exponent):
    weight = torch.ldexp(normal((3, columns), seed), torch.tensor(exponent))
    packed = pack(weight, LayerConfig(bits, group, False, "rtn"))
    _, scale, _, global_scale = packed.operands
    group = min(group, columns)
    step = (scale.double() * global_scale.double())[:, torch.arange(columns) // group]
    # The grid's two ends are off by the rounding of scale (times 2**bits - 1 steps) and offset to half precision.
    largest = torch.stack([weight[:, i : i + group].abs().amax(1) for i in range(0, columns, group)], 1)
    rounding = 4 * 2.0**-11 * largest.double()[:, torch.arange(columns) // group] + 2.0**-24 * float(global_scale)
    assert ((packed.dequantize().double() - weight.double()).abs() <= step / 2 * (1 + 2.0**-10) + rounding).all()


@given(
    bits=BITS,
    group=st.sampled_from([8, 32, 64]),
    name=NAMES,
    seed=SEEDS,
    step=st.integers(-20, 8),
    data=st.data(),
)
def test_a_weight_on_a_grid_of_k_bits_comes_out_exact(bits, group, name, seed, step, data):
    rows, groups = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, groups, group), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    low = torch.randint(-256, 256, (rows, groups, 1), generator=generator)
    weight = torch.ldexp((codes + low).double(), torch.tensor(step)).view(rows, -1).float()
    assert torch.equal(pack(weight, LayerConfig(bits, group, False, name)).dequantize(), weight)


@given(bits=BITS, seed=SEEDS, symmetric=st.booleans(), columns=st.integers(1, 130))
def test_clip_is_never_worse_than_rtn(bits, seed, symmetric, columns):
    weight = normal((8, columns), seed)
    assert clip(weight, Format(bits, 64, symmetric)).error <= rtn(weight, Format(bits, 64, symmetric)).error * (1 + 1e-6)


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_never_raise_the_error(name, symmetric):
    weight = normal((64, 512), 0)
    errors = [QUANTIZERS[name].quantize(weight, Format(bits, 64, symmetric), None).error for bits in range(1, 9)]
    assert errors == sorted(errors, reverse=True)


@given(bits=BITS, exponent=st.integers(-40, 40), seed=SEEDS, name=NAMES)
def test_scaling_by_a_power_of_two_scales_the_result(bits, exponent, seed, name):
    weight = normal((4, 96), seed)
    config = LayerConfig(bits, 32, False, name)
    scaled = pack(torch.ldexp(weight, torch.tensor(exponent)), config).dequantize()
    assert torch.equal(scaled, torch.ldexp(pack(weight, config).dequantize(), torch.tensor(exponent)))


@given(bits=BITS, seed=SEEDS, name=NAMES)
def test_rows_are_quantized_independently(bits, seed, name):
    weight = normal((6, 70), seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    config = LayerConfig(bits, 32, False, name)
    assert torch.equal(pack(weight[order], config).dequantize(), pack(weight, config).dequantize()[order])


@given(bits=BITS, group=GROUPS, columns=st.integers(1, 100), seed=SEEDS)
def test_rounding_what_was_rounded_changes_nothing(bits, group, columns, seed):
    config = LayerConfig(bits, group, False, "rtn")
    weight = normal((3, columns), seed)
    # Of a group far from zero the offset in float16 may be rounded by more than half a step; then its ends are not the grid's.
    for codes in rtn(weight, Format(bits, group)).codes.split(group, dim=1):
        assume(codes.amin(1).eq(0).all() and ((codes.amax(1) == 2**bits - 1) | (codes.amax(1) == 0)).all())
    once = pack(weight, config).dequantize()
    # The full range is that of its own end levels, found anew in float32, whose difference may lose the bits of the larger.
    torch.testing.assert_close(pack(once, config).dequantize(), once, rtol=0, atol=2.0**-20 * float(once.abs().max()))


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), bits=st.integers(1, 8), weighted=st.booleans(), seed=SEEDS)
def test_an_error_term_of_full_rank_restores_the_floats(rows, columns, bits, weighted, seed):
    weight = normal((rows, columns), seed)
    rounded = pack(weight, LayerConfig(bits, group_size=4)).dequantize()
    importance = torch.logspace(-2, 2, columns) if weighted else None
    up, down = low_rank(weight - rounded, min(rows, columns), importance)
    # Singular vectors are orthogonal to an ulp or so for each of at most nine; columns are weighed apart by at most 100.
    torch.testing.assert_close(rounded + up @ down, weight, rtol=0, atol=100 * 9 * 2.0**-22 * float(weight.abs().max()))


def test_clip_meets_the_best_uniform_quantizer_of_a_gaussian():
    # Max (1960), uniform quantizer: relative error .3634 .1188 .03744 .01154 at 1..4 bits. A group of 2048 samples is a little
    # off the Gaussian, and its best grid is found by a search of finite step, hence 5 %.
    weight = normal((512, 2048), 1)
    for bits, classic in ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)):
        assert clip(weight, Format(bits, 2048)).error < classic * 1.05


@given(bits=BITS, group=GROUPS, symmetric=st.booleans(), name=ALL_NAMES, seed=SEEDS)
def test_columns_that_all_count_alike_change_nothing(bits, group, symmetric, name, seed):
    weight, form = normal((5, 90), seed), Format(bits, group, symmetric)
    without = QUANTIZERS[name].quantize(weight, form, None)
    alike = QUANTIZERS[name].quantize(weight, form, Statistics(torch.full((90,), 0.25), 0.25 * torch.eye(90), 1000))
    assert torch.equal(without.codes, alike.codes) and torch.equal(without.scale, alike.scale)
    assert symmetric or torch.equal(without.offset, alike.offset)


def error_of(weight, quantized, form, statistics):
    """The squared error on inputs of these statistics."""
    planes = pack_codes(quantized.codes, form.bits)
    restored = reference.dequantize(
        planes, quantized.scale, quantized.offset, quantized.global_scale, weight.size(1), form.group_size
    )
    return float(((restored - weight).double().square() * statistics.mean_square).sum())


@given(bits=BITS, symmetric=st.booleans(), seed=SEEDS)
def test_clip_lowers_the_error_where_it_counts(bits, symmetric, seed):
    weight, form = normal((8, 128), seed), Format(bits, 64, symmetric)
    statistics = Statistics(torch.logspace(-3, 3, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(seed))])
    # Each search refines the best of the same candidates by its own measure, so one that looks away may be lucky, but not by much.
    plain, weighted = clip(weight, form), clip(weight, form, statistics)
    assert error_of(weight, weighted, form, statistics) <= error_of(weight, plain, form, statistics) * 1.01


@given(name=ALL_NAMES, bits=BITS, zeros=st.integers(0, 20))
def test_columns_that_are_never_used_do_no_harm(name, bits, zeros):
    weight, squares = normal((4, 20), 0), torch.ones(20)
    squares[:zeros] = 0
    quantized = QUANTIZERS[name].quantize(weight, Format(bits, 16), Statistics(squares, squares.diag()))
    assert math.isfinite(quantized.error) and quantized.error < 1


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 1e30, 2.0**-149])
@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_rows(value, name, symmetric):
    weight = torch.full((2, 40), value)
    restored = pack(weight, LayerConfig(4, 16, symmetric, name)).dequantize()
    # Half precision holds the constant to 2**-11; below float32's normal range the scale has one bit.
    assert torch.allclose(restored, weight, rtol=2.0**-10, atol=2.0**-149)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e20, 1e38])
def test_magnitudes_far_outside_half_precision_keep_their_precision(magnitude):
    weight = normal((8, 256), 2)
    weight /= weight.abs().max()
    error = pack(weight * magnitude, LayerConfig(8)).error
    assert math.isclose(error, pack(weight, LayerConfig(8)).error, rel_tol=0.3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_layer(bad):
    weight = torch.zeros(4, 4)
    weight[1, 2] = bad
    with pytest.raises(NonFiniteWeightError, match=r"layer 'model\.fc'.*1 values.*skip"):
        pack(weight, LayerConfig(), "model.fc")


def test_other_dtypes_and_shapes_are_refused():
    with pytest.raises(UnsupportedDtypeError, match=r"float64.*float32"):
        pack(torch.zeros(4, 4, dtype=torch.float64), LayerConfig())
    for shape in ((4,), (4, 4, 4, 4), (0, 4, 4)):
        with pytest.raises(UnsupportedShapeError, match="matrix"):
            pack(torch.zeros(shape), LayerConfig())


def nearest_to_zero(weight, form, statistics):
    return rtn(torch.zeros_like(weight), form)


def test_a_registered_quantizer_is_an_option():
    register_quantizer("zeros", nearest_to_zero)
    try:
        assert pack(normal((4, 40), 0), LayerConfig(quantizer="zeros")).dequantize().count_nonzero() == 0
        assert register_quantizer("zeros", nearest_to_zero) == QUANTIZERS["zeros"]
        with pytest.raises(InvalidOptionError, match="another quantizer of the name 'zeros'"):
            register_quantizer("zeros", rtn)
        with pytest.raises(InvalidOptionError, match=r"needs 'gradients'.*squares"):
            register_quantizer("other", rtn, needs="gradients")
        with pytest.raises(InvalidOptionError, match="zeros"):
            LayerConfig(quantizer="rtm")
    finally:
        del quantizers._by_name["zeros"]
