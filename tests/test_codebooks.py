"""Codebooks: their levels, the quantizers that assign them, and the way of a weight through both layouts and the backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kbit_inductor as kbit
from kbit_inductor._compat import FakeTensorMode
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.kernels.layout import takes_codebook
from kbit_inductor.lowering import registry
from kbit_inductor.lowering.registry import Problem, choose
from kbit_inductor.packing import operand_specs, pack, plane_operands
from kbit_inductor.quantizers import QUANTIZERS, Format, clip, codebook
from kbit_inductor.quantizers.codebooks import CODEBOOKS, distortion, lloyd_max, normal_float, to_bytes
from kbit_inductor.quantizers.levels import Levels
from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.testing.strategies import BITS, FLOATS, GROUPS, SEEDS, normal

WIDTHS = range(2, 8)
NAMES = sorted(CODEBOOKS)


# --- the levels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "classic"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_max_has_the_classic_distortion(bits, classic):
    assert distortion(lloyd_max(bits)) == pytest.approx(classic, rel=5e-4)  # Max (1960), table I


def test_nf4_is_that_of_qlora():
    published = [
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
        0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(normal_float(4), torch.tensor(published, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_ascending_bytes_about_128(name, bits):
    levels = codebook(name, bits)
    assert len(levels) == 2**bits and levels == tuple(sorted(set(levels)))
    assert (levels[0], levels[-1]) == (1, 255)
    if name == "normal":
        assert all(low + high == 256 for low, high in zip(levels, reversed(levels), strict=True))
    else:
        assert 128 in levels


@pytest.mark.parametrize(("bits", "uniform"), [(2, 0.1188), (3, 0.03744), (4, 0.01154), (5, 0.00349), (6, 0.00104), (7, 0.000304)])
def test_rounded_to_bytes_lloyd_max_is_still_better_than_the_best_even_grid(bits, uniform):
    levels = lloyd_max(bits)
    rounded = (torch.tensor(to_bytes(levels), dtype=torch.float64) - 128) * levels[-1] / 127
    assert distortion(levels) <= distortion(rounded) < uniform


@pytest.mark.parametrize("name", [*NAMES, "uniform"])
def test_where_every_code_is_its_own_level_there_is_no_codebook(name):
    assert codebook(name, 1) is None and codebook(name, 8) is None
    assert (codebook(name, 4) is None) == (name == "uniform")


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_computed_whatever_mode_and_default_device(name):
    with FakeTensorMode(), torch.device("meta"):
        assert codebook.__wrapped__(name, 3) == codebook(name, 3)


@given(bits=BITS, data=st.data())
def test_the_nearest_level_is_the_nearest(bits, data):
    levels = None
    if takes_codebook(bits):
        levels = tuple(sorted(data.draw(st.sets(st.integers(0, 255), min_size=2**bits, max_size=2**bits))))
    values = data.draw(st.lists(st.floats(-300, 600, width=32), min_size=1, max_size=20))
    table = torch.tensor(levels or range(2**bits), dtype=torch.float64)
    nearest = Levels(bits, levels).nearest(torch.tensor(values))
    distances = (torch.tensor(values, dtype=torch.float64)[:, None] - table).abs()
    assert torch.equal((nearest.double() - torch.tensor(values).double()).abs(), distances.amin(1))
    assert torch.equal(table[Levels(bits, levels).codes(nearest).int()], nearest.double())


# --- quantizing ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["compiled", "pytorch"])
def _form(request, monkeypatch):
    """Both forms of quantizing; tests/test_cpu_kernels.py compares one with the other."""
    assert registry.cpu_library_problem() is None
    if request.param == "pytorch":
        monkeypatch.setattr(registry, "cpu_library_problem", lambda: "not in this test")


@pytest.mark.parametrize("symmetric", [False, True])
def test_gaussian_weights_in_groups_of_64(_form, symmetric):
    """The errors that design figures promise for Lloyd-Max levels with a fitted scale, and always below an even grid's."""
    weight = normal((512, 512), 0)
    for bits, promised in ((2, 0.124), (3, 0.035), (4, 0.0090), (5, 0.0025)):
        error = clip(weight, Format(bits, 64, symmetric, codebook("normal", bits))).error
        assert error < promised
        assert error < clip(weight, Format(bits, 64, symmetric)).error


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_more_bits_never_raise_the_error(_form, name, symmetric):
    weight = normal((64, 256), 0)
    errors = [pack(weight, LayerConfig(bits, 64, symmetric, codebook=name)).error for bits in WIDTHS]
    assert errors == sorted(errors, reverse=True)


# A symmetric grid of levels that are no mirror image has a right side up, which the weight does not tell: so not "nf".
@pytest.mark.parametrize(("name", "symmetric"), [("normal", False), ("normal", True), ("nf", False)])
@given(bits=st.integers(2, 7), method=st.sampled_from(sorted(QUANTIZERS)), data=st.data())
def test_a_weight_on_the_levels_comes_out_exact(name, symmetric, bits, method, data):
    levels = torch.tensor(codebook(name, bits)).float() - 128
    seed, step = data.draw(SEEDS), data.draw(st.integers(-20, 8))
    codes = torch.randint(0, 2**bits, (3, 2, 40), generator=torch.Generator().manual_seed(seed))
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    weight = torch.ldexp(levels[codes], torch.tensor(step)).view(3, 80)
    packed = pack(weight, LayerConfig(bits, 40, symmetric, method, codebook=name))
    assert packed.error == 0 and torch.equal(packed.dequantize(), weight)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 1e30, 2.0**-149])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_rows(_form, value, symmetric):
    for name in NAMES:
        weight = torch.full((2, 40), value)
        restored = pack(weight, LayerConfig(4, 16, symmetric, codebook=name)).dequantize()
        # Half precision holds the constant to 2**-11; below float32's normal range the scale has one bit.
        assert torch.allclose(restored, weight, rtol=2.0**-10, atol=2.0**-149)


# --- packing and operators -------------------------------------------------------------------------------------------


@given(
    bits=BITS, rows=st.integers(0, 20), columns=st.integers(0, 150), group=GROUPS, symmetric=st.booleans(),
    name=st.sampled_from(NAMES), dtype=FLOATS, seed=SEEDS,
)  # fmt: skip
def test_both_layouts_hold_the_same_weight(bits, rows, columns, group, symmetric, name, dtype, seed):
    weight, config = normal((rows, columns), seed, dtype), LayerConfig(bits, group, symmetric, codebook=name)
    planes, tiled = pack(weight, config), pack(weight, config, layout="tiled")
    for packed in (planes, tiled):
        assert [(tuple(o.shape), o.dtype) for o in packed.operands] == operand_specs(rows, columns, config, packed.layout)
    restored = planes.dequantize()
    assert torch.isfinite(restored).all() and torch.equal(restored, tiled.dequantize())
    exact = (restored.double() - weight.double()).square().sum()
    assert planes.error == pytest.approx(float(exact / weight.double().square().sum()) if exact else 0, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_reference_operators_pass_opcheck(symmetric):
    config, weight = LayerConfig(3, 8, symmetric, codebook="nf"), normal((7, 20), 0)
    *operands, levels = plane_operands(pack(weight, config).operands, config)
    x, bias, grad = normal((2, 5, 20), 1).requires_grad_(), normal((7,), 2).requires_grad_(), normal((2, 7), 3).requires_grad_()
    torch.library.opcheck(torch.ops.kbit.linear.default, (x, *operands, bias, 8, levels))
    torch.library.opcheck(torch.ops.kbit.linear_grad_input.default, (grad, *operands, 20, 8, levels))
    torch.library.opcheck(torch.ops.kbit.embedding.default, (torch.tensor([[0, 6]]), *operands, 20, 8, torch.float32, levels))


@pytest.mark.parametrize("layout", ["planes", "tiled"])
def test_gradients_are_those_of_the_dequantized_weight(layout):
    config = LayerConfig(4, 16, codebook="normal")
    packed = pack(normal((12, 40), 0), config, layout=layout)
    x, grad = normal((3, 40), 1).requires_grad_(), normal((3, 12), 3)
    if layout == "tiled":
        y = torch.ops.kbit.linear_cpu(x, packed.operands[0], None, 12, 16)
    else:
        *operands, levels = plane_operands(packed.operands, config)
        y = torch.ops.kbit.linear(x, *operands, None, 16, levels)
    plain = torch.nn.functional.linear(x, packed.dequantize())
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(plain, x, grad))


def test_triton_takes_codebooks():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert choose(Problem("linear", "cuda", torch.float32, 64, 64, 4, 64, uniform=False)).kernel.name == "triton"


# --- the backend -----------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 72)
        self.up, self.down = torch.nn.Linear(72, 100), torch.nn.Linear(100, 40)

    def forward(self, tokens):
        return self.down(torch.relu(self.up(self.embed(tokens))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 17])
def test_a_compiled_model_computes_with_the_levels(name, batch):
    model, tokens = Model().eval(), torch.randint(0, 50, (batch,))
    overrides = {"embed": {"bits": 3}, "down": {"bits": 7}, "up": {"codebook": "uniform"}}
    options = {"codebook": name, "bits": 3, "min_elements": 0, "overrides": overrides}
    with torch.no_grad():
        y = torch.compile(model, backend="kbit", options=options)(tokens)
        assert relative_error(y, dequantized_copy(model)(tokens)) < 1e-5
        report = kbit.explain(model, tokens, config=options)
    assert [report.layer(layer).config.codebook for layer in ("embed", "up", "down")] == [name, "uniform", name]
    assert f"3 {name}" in str(report) and f"7 {name}" in str(report)


def test_without_the_compiled_kernels_the_reference_computes_the_same(monkeypatch):
    monkeypatch.setattr(registry, "cpu_library_problem", lambda: "not in this test")
    model, x = torch.nn.Sequential(torch.nn.Linear(72, 40)).eval(), torch.randn(3, 72)
    options = {"codebook": "normal", "min_elements": 0}
    with torch.no_grad():
        y = torch.compile(model, backend="kbit", options=options)(x)
        assert relative_error(y, dequantized_copy(model)(x)) < 1e-5
        assert kbit.explain(model, x, config=options).layer("0").kernels == ("reference",)


@pytest.mark.parametrize("value", ["gaussian", 3, None])
def test_an_unknown_codebook_lists_the_known_ones(value):
    for options in ({"codebook": value}, {"overrides": {"a": {"codebook": value}}}):
        with pytest.raises(kbit.InvalidOptionError, match=r"'codebook' is .*uniform, normal, nf"):
            Config.from_options(options)


def test_layers_that_store_the_same_share_a_packed_weight():
    assert LayerConfig(1, codebook="nf").storage() == LayerConfig(1).storage()
    assert LayerConfig(8, codebook="normal").storage() == LayerConfig(8).storage()
    assert LayerConfig(4, codebook="normal").storage() != LayerConfig(4).storage()
