"""One stored weight at every precision: nested codes, their error, and kernels that read no plane more than they are told."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

import kbit_inductor as kbit
from kbit_inductor import LayerConfig
from kbit_inductor.kernels.cpu import build
from kbit_inductor.packing import PackedWeight, operand_specs, pack
from kbit_inductor.quantizers import Format, Statistics, cascade, clip
from kbit_inductor.weights.store import STORE

build.load()
ISAS = torch.ops.kbit.isas_cpu()
HEADER, TAIL = 64, 64
pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


def packed_at(packed: PackedWeight, bits: int) -> PackedWeight:
    """The weight of the first ``bits`` planes by itself, as the CPU's kernels read any other."""
    return packed.leading(bits).laid_out("tiled")


@settings(max_examples=20)
@given(
    rows=st.integers(0, 40), columns=st.integers(0, 150), group=st.sampled_from([1, 3, 16, 64, -1]), bits=st.integers(1, 8),
    tokens=st.integers(1, 18), isa=st.sampled_from(ISAS), activation_bits=st.sampled_from([3, 8, 16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_first_planes_are_the_weight_of_so_many_bits(rows, columns, group, bits, tokens, isa, activation_bits, seed):
    torch.manual_seed(seed)
    packed = pack(torch.randn(rows, columns), LayerConfig(bits, group, cascade=True), layout="tiled")
    (tiled,) = packed.operands
    assert operand_specs(rows, columns, packed.config, "tiled") == [(tuple(tiled.shape), tiled.dtype)]
    x, bias = torch.randn(tokens, columns), torch.randn(rows)
    torch.ops.kbit.force_isa_cpu(isa)
    try:
        for k in range(1, bits + 1):
            (alone,) = packed_at(packed, k).operands
            with kbit.precision(k):
                for operator, *arguments in (("linear_cpu", bias, rows, activation_bits), ("dequantize_cpu", 0, rows)):
                    call = getattr(torch.ops.kbit, operator)
                    given = (x,) if operator == "linear_cpu" else ()
                    assert torch.equal(call(*given, tiled, *arguments), call(*given, alone, *arguments))
    finally:
        torch.ops.kbit.force_isa_cpu("")


@settings(max_examples=10)
@given(rows=st.integers(1, 20), columns=st.integers(1, 90), group=st.sampled_from([5, 32]), bits=st.integers(1, 8))
def test_layouts_hold_the_same(rows, columns, group, bits):
    packed = pack(torch.randn(rows, columns), LayerConfig(bits, group, cascade=True))
    again = packed.laid_out("tiled").laid_out("planes")
    assert all(torch.equal(one, other) for one, other in zip(packed.operands, again.operands, strict=True))
    plain = packed.laid_out("tiled").plain
    assert not plain.config.cascade and plain.error == packed.error and plain.plain is plain
    assert torch.equal(plain.laid_out("tiled").dequantize(), packed.dequantize())
    assert [(tuple(t.shape), t.dtype) for t in packed.operands] == operand_specs(rows, columns, packed.config, "planes")


@pytest.mark.parametrize("bits", range(1, 8))
def test_no_other_plane_and_no_other_grid_is_read(bits):
    config = LayerConfig(8, 64, cascade=True)
    (tiled,) = pack(torch.randn(16, 256), config, layout="tiled").operands
    x = torch.randn(3, 256)
    with kbit.precision(bits):
        expected = torch.ops.kbit.linear_cpu(x, tiled, None, 16, 8)
    grid, plane = 256 // 64 * 16 * 2 * 2, 16 * 256 // 8  # bytes of one row block
    begin = HEADER + 8 * grid
    for first, last in (
        (HEADER, HEADER + (bits - 1) * grid),
        (HEADER + bits * grid, begin),
        (begin + bits * plane, begin + 8 * plane),
    ):
        tiled[first:last] = 0xAA
    assert len(tiled) == begin + 8 * plane + TAIL
    with kbit.precision(bits):
        assert torch.equal(torch.ops.kbit.linear_cpu(x, tiled, None, 16, 8), expected)


DISTRIBUTIONS = {
    "gaussian": torch.distributions.Normal(0.0, 1.0),
    "laplace": torch.distributions.Laplace(0.0, 1.0),
    "heavy tails": torch.distributions.StudentT(4.0),
    "uniform": torch.distributions.Uniform(-1.0, 1.0),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_error_is_within_a_tenth_of_the_search_for_each_precision(kind):
    weight = DISTRIBUTIONS[kind].sample((96, 512))
    nested = cascade(weight, Format(8, 64))
    own = [clip(weight, Format(bits, 64)).error for bits in range(1, 9)]
    assert all(ours <= 1.1 * theirs for ours, theirs in zip(nested.errors, own, strict=True)), (nested.errors, own)


@settings(max_examples=10)
@given(bits=st.integers(2, 8), group=st.sampled_from([1, 7, 32]), seed=st.integers(0, 99))
def test_more_bits_are_never_worse(bits, group, seed):
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed))
    errors = cascade(weight, Format(bits, group)).errors
    # Cells only become smaller. A grid that is rounded to float16 may cost what it is rounded by.
    assert all(more <= less * 1.01 + 2.0**-20 for less, more in itertools.pairwise(errors))


def test_what_codes_hold_exactly_is_exact():
    codes = torch.randint(0, 256, (4, 128))
    codes[:, ::32], codes[:, 1::32] = 0, 255
    assert cascade(codes * 0.5 - 20, Format(8, 32)).errors[-1] < 1e-10
    for weight in (torch.zeros(3, 20), torch.full((3, 20), -1.5), torch.empty(0, 20), torch.empty(3, 0)):
        assert cascade(weight, Format(8, 16)).errors == (0.0,) * 8


def test_statistics_say_which_columns_count():
    weight = torch.randn(32, 128)
    square = torch.ones(128)
    square[::4] = 100
    plain, weighted = (cascade(weight, Format(3, 64), statistics) for statistics in (None, Statistics(square)))

    def lost(nested):
        scale, offset = (grid[-1].float().repeat_interleave(64, 1) for grid in (nested.scale, nested.offset))
        values = (nested.codes * scale + offset) * nested.global_scale
        return float(((values - weight).square() * square).sum())

    assert lost(weighted) < lost(plain)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 100)

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head(x + self.second(torch.relu(self.first(x))))


OPTIONS = {"bits": 8, "cascade": True, "min_elements": 0}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def of_bits(packed: nn.Module, bits: int, but: str = "") -> nn.Module:
    """The model whose weights, those of ``but`` excepted, are the first ``bits`` planes alone."""
    alone = copy.deepcopy(packed)
    for name, module in alone.named_modules():
        if isinstance(module, kbit.models.modules.PackedMatrix) and name != f"{but}.weight":
            module._set(packed_at(module.packed, bits))
    return alone


@pytest.mark.parametrize("how", ["quantize_", "backend"])
def test_precision_changes_without_compiling_or_packing_again(model, how):
    tokens = torch.randint(0, 100, (2, 5))
    packed = kbit.quantize_(copy.deepcopy(model), OPTIONS)
    compiled = (
        torch.compile(packed, backend="kbit") if how == "quantize_" else torch.compile(model, backend="kbit", options=OPTIONS)
    )
    compiled(tokens)
    graphs = counters["stats"]["unique_graphs"]
    nbytes = STORE.nbytes()
    for bits in (3, 8, 1, 5):
        with kbit.precision(bits):
            assert torch.allclose(compiled(tokens), of_bits(packed, bits)(tokens), atol=1e-5)
    assert torch.allclose(compiled(tokens), packed(tokens), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs and STORE.nbytes() == nbytes


def test_precision_of_a_layer(model):
    tokens = torch.randint(0, 100, (2, 5))
    packed = kbit.quantize_(model, OPTIONS)
    whole = packed(tokens)
    with kbit.precision(2, packed.table, packed.first, packed.second):
        assert torch.allclose(packed(tokens), of_bits(packed, 2, but="head")(tokens), atol=1e-5)
        with kbit.precision(1):  # the lower one counts
            assert torch.allclose(packed(tokens), of_bits(packed, 1)(tokens), atol=1e-5)
        with kbit.precision(6, packed.head), kbit.precision(8, packed.table, packed.first, packed.second):
            head_alone = packed(tokens)
    assert not torch.equal(head_alone, whole) and torch.equal(packed(tokens), whole)


def test_an_error_within_leaves_the_precision_as_it_was(model):
    packed = kbit.quantize_(model, OPTIONS)
    tokens = torch.randint(0, 100, (1, 4))
    whole = packed(tokens)
    for modules in ((), (packed,)):
        with pytest.raises(ZeroDivisionError), kbit.precision(2, *modules):
            raise ZeroDivisionError
        assert torch.equal(packed(tokens), whole)


def test_saved_and_loaded(model, tmp_path):
    tokens = torch.randint(0, 100, (2, 5))
    packed = kbit.quantize_(model, OPTIONS)
    assert packed.state_dict()["first.weight.scale"].shape == (8, 96, 1)
    kbit.save(packed, tmp_path)
    loaded = kbit.load(tmp_path, Model)
    for bits in (2, 8):
        with kbit.precision(bits):
            assert torch.equal(loaded(tokens), packed(tokens))


def test_a_kernel_that_reads_whole_weights_takes_the_full_precision(model, monkeypatch):
    registry = kbit.lowering.registry
    monkeypatch.setattr(registry, "KERNELS", [kernel for kernel in registry.KERNELS if kernel.name == "reference"])
    packed = kbit.quantize_(copy.deepcopy(model), OPTIONS)
    assert not packed.first.weight.config.cascade and packed.first.weight.planes.shape[0] == 8
    with pytest.raises(kbit.NoCascadeError, match="cascade=True"), kbit.precision(2, packed):
        pass
    assert packed(torch.randint(0, 100, (1, 4))).isfinite().all()


def test_mistakes_say_what_to_do(model):
    for bits in (0, 9, 2.0, True):
        with pytest.raises(kbit.InvalidOptionError, match="1 to 8"), kbit.precision(bits):
            pass
    with pytest.raises(kbit.NoCascadeError, match="cascade=True"), kbit.precision(3, model):
        pass
    for wrong in ({"symmetric": True}, {"codebook": "normal"}, {"quantizer": "rtn"}, {"cascade": 1}):
        with pytest.raises(kbit.InvalidOptionError, match="'cascade'"):
            LayerConfig(**{"cascade": True, **wrong})
    with pytest.raises(kbit.InvalidOptionError, match="4 planes"):
        pack(torch.randn(8, 8), LayerConfig(4, cascade=True)).leading(5)
