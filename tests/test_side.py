"""Floats beside the codes: a low-rank term, columns that stay in float, a corrected bias; and that the product adds them itself."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.models.saving import packed_matrix, stored_weight
from kbit_inductor.packing import pack
from kbit_inductor.quantizers import Statistics
from kbit_inductor.quantizers.compensation import DAMPING
from kbit_inductor.side import side_specs
from kbit_inductor.testing import assert_equivalent, relative_error, rewrite
from kbit_inductor.testing.strategies import SEEDS, normal

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
SIDE = {"low_rank": 3, "outliers": 0.1, "bias_correction": True}
OPTIONS = {"bits": 3, "group_size": 16, "min_elements": 0, **SIDE}
QUANTIZERS = st.sampled_from(["rtn", "clip", "hqq", "gptq"])


def statistics_of(columns: int, seed: int, rows: int = 64) -> Statistics:
    x = normal((rows, columns), seed) * torch.logspace(-1, 1, columns) + 0.5
    return Statistics(x.square().mean(0), x.t() @ x / rows, rows, mean=x.mean(0))


@given(
    rows=st.integers(0, 9), columns=st.integers(0, 20), rank=st.integers(0, 4), share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    correct=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), calibrated=st.booleans(),
    name=QUANTIZERS, seed=SEEDS,
)  # fmt: skip
def test_a_side_term_is_what_was_foretold_and_never_makes_a_weight_worse(
    rows, columns, rank, share, correct, dtype, calibrated, name, seed
):
    weight = normal((rows, columns), seed).to(dtype)
    statistics = statistics_of(columns, seed) if calibrated and columns else None
    config = kbit.LayerConfig(3, 8, quantizer=name, low_rank=rank, outliers=share, bias_correction=correct)
    packed = pack(weight, config, statistics=statistics)
    parts = {} if packed.side is None else packed.side.parts
    assert {n: (tuple(t.shape), t.dtype) for n, t in parts.items()} == side_specs(rows, columns, config, dtype)
    assert packed.nbytes == packed.coded.nbytes + sum(part.nbytes for part in parts.values())
    norm = float(weight.double().square().sum())
    left = float((packed.dequantize(torch.float64) - weight.double()).square().sum())
    assert packed.error == pytest.approx(left / norm if norm else 0.0, rel=1e-3, abs=1e-6)  # float32 sums of squares
    if statistics is None and not share:
        plain = pack(weight, config.without_side)
        assert packed.error <= plain.error + 8 * torch.finfo(dtype).eps  # the floats are rounded


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 12), exponent=st.sampled_from([-60, 0, 60]), calibrated=st.booleans(),
    name=QUANTIZERS, seed=SEEDS,
)  # fmt: skip
@pytest.mark.parametrize("options", [{"low_rank": 12}, {"outliers": 1.0}], ids=["full rank", "all columns"])
def test_a_term_of_full_rank_and_one_of_all_columns_restore_the_floats(options, rows, columns, exponent, calibrated, name, seed):
    weight = normal((rows, columns), seed) * 2.0**exponent
    statistics = statistics_of(columns, seed) if calibrated else None
    restored = pack(weight, kbit.LayerConfig(2, 4, quantizer=name, **options), statistics=statistics).dequantize()
    # Singular vectors are orthogonal to an ulp or so for each of at most twelve; columns are weighed apart by at most 100, or in
    # the damped root of E[x xT] by the root of 12 over the damping.
    torch.testing.assert_close(restored, weight, rtol=0, atol=100 * 12 * 2.0**-22 * float(weight.abs().max()))


def test_a_low_rank_term_is_the_best_for_the_outputs_that_calibration_has_seen():
    weight, x = normal((24, 32), 0), normal((500, 32), 1) @ normal((32, 32), 2)
    full = Statistics(x.square().mean(0), x.t() @ x / 500, 500)
    left = {}
    for name, known in (("none", None), ("diagonal", dataclasses.replace(full, hessian=None)), ("full", full)):
        lost = pack(weight, kbit.LayerConfig(2, 16, quantizer="rtn", low_rank=8), statistics=known).dequantize() - weight
        left[name] = float((x @ lost.t()).square().sum())
    assert left["full"] < left["diagonal"] and left["full"] < left["none"]


def test_columns_that_stay_are_those_that_cost_most_and_codes_do_not_hold_them():
    weight, scale = normal((16, 40), 0), torch.ones(40)
    weight[:, 7] *= 20
    scale[[11, 30]] = 100.0
    config = kbit.LayerConfig(4, 8, symmetric=True, quantizer="gptq", outliers=3 / 40)
    packed = pack(weight, config, statistics=Statistics(scale, scale.diag(), 100))
    assert packed.side.columns.tolist() == [7, 11, 30]
    assert (packed.coded.dequantize()[:, [7, 11, 30]] == 0).all()
    assert torch.equal(packed.dequantize()[:, [7, 11, 30]], weight[:, [7, 11, 30]])
    assert packed.error < pack(weight, config.without_side).error / 10


def test_a_corrected_bias_takes_the_mean_error_away():
    x, left = torch.randn(200, 48) + 4 * torch.randn(48), {}
    for correct in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 24, bias=False), nn.Linear(24, 24))
        wanted = [layer(x[:, : layer.in_features]) for layer in model]
        kbit.quantize_(model, {"bits": 2, "group_size": 16, "min_elements": 0, "bias_correction": correct}, x)
        left[correct] = [(layer(x[:, : layer.in_features]) - y).mean(0) for layer, y in zip(model, wanted, strict=True)]
    # The second layer is given what the first one gives, so only the first is right on average for x.
    assert left[False][0].abs().max() > 0.1
    torch.testing.assert_close(left[True][0], torch.zeros(24), rtol=0, atol=2.0**-15)  # sums of 48 terms of about 4 in float32


class Attention(nn.Module):
    """Products of one x, one with an activation behind it, one in a residual sum, after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(48, eps=1e-6)
        self.q, self.k, self.v = nn.Linear(48, 40), nn.Linear(48, 16, bias=False), nn.Linear(48, 16)
        self.out = nn.Linear(72, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.out(torch.cat([self.q(y), functional.silu(self.k(y)), self.v(y)], -1))


def calls(model: nn.Module, *inputs: Tensor, **options: object) -> tuple[dict[str, int], dict[str, int]]:
    without_chains = [each for each in backend.passes() if each.name != "chain"]
    (graph,) = rewrite(model.eval().requires_grad_(False), *inputs, config=OPTIONS | options, passes=without_chains)
    return dict(graph.operators), dict(graph.fusions)


@pytest.mark.parametrize("swapped", [False, True], ids=["backend", "quantize_"])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48), (48,)], ids=str)
def test_the_product_adds_the_side_term_itself(swapped: bool, shape: tuple[int, ...]) -> None:
    model = Attention()
    if swapped:
        kbit.quantize_(model, OPTIONS)
    operators, fusions = calls(model, torch.randn(shape))
    assert fusions == {"residual": 4}
    assert operators["kbit.fused_linear_cpu.default"] == 4 and "kbit.linear_cpu.default" not in operators
    # What is left to be summed is x, and the three biases that are corrected, which are vectors.
    assert operators["add"] == 1 + 3
    merged = calls(Attention(), torch.randn(shape), low_rank=0, outliers=0.0, bias_correction=False)[1]
    assert merged == {"siblings": 3, "norm": 1, "residual": 1}


@pytest.mark.parametrize("swapped", [False, True], ids=["backend", "quantize_"])
def test_corrected_biases_stand_in_no_fusions_way(swapped: bool) -> None:
    options = {**OPTIONS, "low_rank": 0, "outliers": 0.0}
    model, x = Attention().eval().requires_grad_(False), torch.randn(5, 48)
    if swapped:
        kbit.quantize_(model, options)
    operators, fusions = calls(model, x, **options)
    assert fusions == {"siblings": 3, "norm": 1, "residual": 1} and operators["kbit.fused_linear_cpu.default"] == 2
    (graph,) = rewrite(nn.Sequential(*(nn.Linear(48, 48) for _ in range(3))), x, config=options)
    assert graph.fusions == {"chained": 3}
    if not swapped:
        assert_equivalent(model, x, options, through_inductor=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_model_computes_what_the_codes_and_the_floats_stand_for(dtype: torch.dtype) -> None:
    model, x = Attention().to(dtype), torch.randn(5, 48, dtype=dtype)
    assert_equivalent(model, x, {**OPTIONS, "bias_correction": False}, through_inductor=False)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)


def test_both_ways_of_packing_and_back_give_the_same(without_inductor: None) -> None:
    model, x = Attention().eval().requires_grad_(False), torch.randn(64, 48)
    calibration = kbit.calibrate(model, x, OPTIONS)
    compiled = torch.compile(model, backend="kbit", options={**OPTIONS, "calibration": calibration})(x)
    exact = model(x)
    swapped = kbit.quantize_(model, OPTIONS, calibration)
    torch.testing.assert_close(swapped(x), compiled, rtol=0, atol=1e-5)
    plain = kbit.quantize_(Attention(), OPTIONS)  # no statistics: the bias is not corrected
    assert plain.q.weight.side.shift.abs().max() == 0 and swapped.q.weight.side.shift.abs().max() > 0
    torch.testing.assert_close(kbit.dequantize_(swapped)(x), compiled, rtol=0, atol=1e-5)
    assert relative_error(compiled, exact) < relative_error(kbit.quantize_(Attention(), OPTIONS)(x), exact)


def test_gradients_pass_through_the_side_term() -> None:
    torch.set_grad_enabled(True)
    layer = kbit.quantize_(nn.Sequential(nn.Linear(48, 24)), OPTIONS)
    x = torch.randn(3, 48, requires_grad=True)
    for function in (layer, torch.compile(layer, backend="aot_eager")):
        (given,) = torch.autograd.grad(function(x).sum(), x)
        torch.testing.assert_close(given, layer[0].weight.dequantize().sum(0).expand(3, 48), rtol=0, atol=1e-5)


def test_a_saved_model_has_its_floats_and_says_so_to_older_readers(tmp_path: Path) -> None:
    make = lambda: nn.Sequential(nn.Linear(48, 24), nn.Linear(24, 40, bias=False)).to(torch.bfloat16)  # noqa: E731
    model, x = kbit.quantize_(make(), OPTIONS, torch.randn(64, 48, dtype=torch.bfloat16)), torch.randn(3, 48, dtype=torch.bfloat16)
    kbit.save(model, tmp_path)
    loaded = kbit.load(tmp_path, make)
    assert torch.equal(loaded(x), model(x))
    state = model.state_dict()
    assert {name for name in state if "side" in name} == {
        f"{layer}.weight.side_{part}" for layer in (0, 1) for part in ("down", "columns", "up", "shift")
    }
    fresh = kbit.quantize_(make(), OPTIONS)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    wide = copy.deepcopy(model).float()
    assert wide[0].weight.side.up.dtype == torch.float32
    manifest = json.loads((tmp_path / "kbit.json").read_text())
    assert manifest["version"] == 2 and manifest["weights"][0]["options"]["low_rank"] == 3


def test_a_saved_column_that_there_is_not_is_refused() -> None:
    matrix = kbit.quantize_(nn.Sequential(nn.Linear(48, 24)), OPTIONS)[0].weight
    weight = stored_weight(matrix, ["fc"])
    assert torch.equal(packed_matrix(weight, matrix.stored(), "cpu").dequantize(), matrix.dequantize())
    with pytest.raises(kbit.CorruptModelError, match="not among 48 columns"):
        packed_matrix(weight, {**matrix.stored(), "side_columns": matrix.side_columns + 47}, "cpu")


def test_what_is_looked_up_has_codes_alone() -> None:
    model = nn.Sequential(nn.Embedding(40, 48), nn.Linear(48, 24))
    options = {**OPTIONS, "overrides": {"0": SIDE}}
    told = kbit.explain(model, torch.arange(3), config=options)
    assert any("looked up" in reason for reason in told.layer("0").reasons)
    assert any("a term of rank 3, 5 input columns, a corrected bias" in reason for reason in told.layer("1").reasons)
    assert any("mean of its inputs is not known" in reason for reason in told.layer("1").reasons)
    kbit.quantize_(model, options)
    assert model[0].weight.side is None and model[1].weight.side is not None
    told = kbit.explain(model, torch.arange(3))
    assert any("a term of rank 3" in reason for reason in told.layer("1").reasons)


def test_the_ends_of_a_model_have_codes_alone() -> None:
    model = nn.Sequential(nn.Embedding(40, 48), nn.Linear(48, 48), nn.Linear(48, 40))
    kbit.quantize_(model, OPTIONS)
    assert [layer.weight.side is None for layer in model] == [True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_rank": -1}, "zero or more"),
        ({"low_rank": True}, "zero or more"),
        ({"outliers": 1.5}, "from 0 to 1"),
        ({"outliers": "1%"}, "from 0 to 1"),
        ({"bias_correction": 1}, "True or False"),
        ({"low_rank": 4, "cascade": True}, "'cascade'"),
        ({"outliers": 0.1, "quantizer": "distill"}, "'distill'"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(kbit.InvalidOptionError, match=message):
        kbit.Config(**options)


def test_columns_in_float_make_good_what_they_can_of_the_others() -> None:
    weight, x = normal((24, 48), 0), normal((400, 48), 1) @ normal((48, 48), 2) * torch.logspace(-1, 1, 48)
    seen, left = Statistics(x.square().mean(0), x.t() @ x / 400, 400), {}
    for name, options in (("gptq", {}), ("columns", {"outliers": 0.1})):
        packed = pack(weight, kbit.LayerConfig(2, 16, quantizer="gptq", **options), statistics=seen)
        left[name] = packed.dequantize() - weight
    output = {name: float((x @ lost.t()).square().sum() / 400) for name, lost in left.items()}
    assert output["columns"] < output["gptq"]
    # Ridge regression minimizes its squared error and a penalty, so it is above the least by at most the penalty of that.
    index = packed.side.columns.long()
    others = x @ (weight - packed.coded.dequantize()).index_fill(1, index, 0.0).t()
    best = torch.linalg.lstsq(x[:, index], others).solution
    least = float((others - x[:, index] @ best).square().sum() / 400)
    ridge = DAMPING * float(seen.mean_square.mean())
    assert output["columns"] <= (least + ridge * float(best.square().sum())) * (1 + 1e-3)  # float32
