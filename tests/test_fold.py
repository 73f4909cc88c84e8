"""What scales the rows of a product becomes part of its weight, which is packed again when that changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.testing import assert_equivalent, rewrite

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
OPTIONS = {"bits": 4, "group_size": 16, "min_elements": 0, "activation_bits": 16}


def with_statistics(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
    return norm


class LayerScale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LateScale(LayerScale):
    """A scale that is given its shape behind the product, as PoolFormer's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma.unsqueeze(-1).unsqueeze(-1) * x


class Times(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def conv(dims: int, **options) -> nn.Module:
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 6, 3, **options)


FOLDED = {
    "linear": ([nn.Linear(24, 16), with_statistics(nn.BatchNorm1d(16))], (3, 24)),
    "linear without bias, norm without weight": (
        [nn.Linear(24, 16, bias=False), with_statistics(nn.BatchNorm1d(16, affine=False))], (3, 24)),
    "1-d": ([conv(1), with_statistics(nn.BatchNorm1d(6))], (2, 4, 9)),
    "2-d, strided": ([conv(2, stride=2, bias=False), with_statistics(nn.BatchNorm2d(6))], (2, 4, 9, 7)),
    "2-d, in groups": ([conv(2, groups=2, padding=1), with_statistics(nn.BatchNorm2d(6))], (2, 4, 5, 5)),
    "3-d": ([conv(3), with_statistics(nn.BatchNorm3d(6))], (1, 4, 4, 4, 4)),
    "no rows": ([nn.Linear(24, 16), with_statistics(nn.BatchNorm1d(16))], (0, 24)),
    "layer scale": ([nn.Linear(24, 16), LayerScale(16)], (2, 3, 24)),
    "layer scale that is shaped late": ([nn.ReLU(), conv(2), LateScale(6)], (2, 4, 5, 5)),
    "layer scale of channels": ([conv(2), LayerScale(6, 1, 1)], (2, 4, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_what_scales_rows_is_folded(name: str) -> None:
    layers, shape = FOLDED[name]
    model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert graph.fusions["folded"] == 1
    assert not any("batch_norm" in called for called in graph.operators)
    assert len(graph.context.slots) == 1 and graph.context.slots[0].derivation is not None
    assert_equivalent(model, x, OPTIONS, through_inductor=False)


@pytest.mark.parametrize("name", ["2-d, strided", "layer scale"])
def test_with_symbolic_sizes(name: str) -> None:
    layers, shape = FOLDED[name]
    model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    (graph,) = rewrite(model, x, config=OPTIONS, dynamic=True)
    assert graph.fusions["folded"] == 1  # though Dynamo makes a norm's eps an input
    assert_equivalent(model, x, OPTIONS, through_inductor=False, dynamic=True)


NOT_FOLDED = {
    "depthwise": ([nn.Conv2d(4, 4, 3, groups=4), with_statistics(nn.BatchNorm2d(4))], (2, 4, 5, 5)),
    "by another dimension": ([nn.Linear(24, 16), with_statistics(nn.BatchNorm1d(5))], (3, 5, 24)),
    "by row of x": ([nn.Linear(24, 16), LayerScale(3, 1)], (3, 24)),
    "a matrix": ([nn.Linear(24, 16), LayerScale(3, 16)], (3, 24)),
    "by itself": ([nn.Linear(24, 16), Times(lambda x: x * x)], (3, 24)),
    "a number": ([nn.Linear(24, 16), Times(lambda x: 2 * x)], (3, 24)),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_does_more_is_left(name: str) -> None:
    layers, shape = NOT_FOLDED[name]
    model, x = nn.Sequential(*layers).eval(), torch.randn(shape)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert not graph.fusions["folded"]


class Norm(nn.Module):
    """A product behind which stand a norm and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(64, 48), with_statistics(nn.BatchNorm1d(48))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.fc(x)))


def test_an_activation_behind_the_norm_becomes_part_of_the_product() -> None:
    (graph,) = rewrite(Norm().eval(), torch.randn(3, 64), config=OPTIONS)
    assert graph.fusions["activation"] == 1 and "relu" not in graph.operators


NUMBERS = {
    "a factor": lambda y, x: x + y * 0.2,
    "a divisor": lambda y, x: y / 3 + x,
    "a whole number": lambda y, x: 2 * y + x,
}


class Scaled(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(48, 48), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x), x)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_folded_where_a_sum_follows_it(name: str) -> None:
    model, x = Scaled(NUMBERS[name]), torch.randn(3, 48)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert graph.fusions == {"folded": 1, "residual": 1}
    assert graph.operators == {"kbit.fused_linear_cpu.default": 1, "mul": 1}  # of the bias
    assert_equivalent(model, x, OPTIONS, through_inductor=False)


@pytest.mark.parametrize(
    "function",
    [lambda y, x: x + y * float("inf"), lambda y, x: x + y * 0, lambda y, x: x + y * True, lambda y, x: x + 3 / y],
    ids=["infinite", "zero", "a truth value", "a dividend"],
)
def test_numbers_that_no_weight_can_take_are_left(function) -> None:
    assert not rewrite(Scaled(function), torch.randn(3, 48), config=OPTIONS)[0].fusions["folded"]


def test_a_softcap_is_explained() -> None:
    model, x = Scaled(lambda y, x: torch.tanh(y / 30) * 30), torch.randn(3, 48)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert not graph.fusions and graph.operators == {"kbit.fused_linear_cpu.default": 1, "truediv": 1, "tanh": 1, "mul": 1}
    assert "softcap" in graph.context.reasons["fc"][0]


def test_a_fold_that_is_not_done_is_explained(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Norm(), torch.randn(3, 64)
    (training,) = rewrite(model.train(), x, config=OPTIONS)
    assert not training.fusions["folded"] and not training.context.reasons  # statistics of the batch: nothing to fold
    (released,) = kbit.explain(model.eval(), x, config={**OPTIONS, "release_weights": True}).layers
    assert released.matched and "not scaled by what follows, batch_norm: release_weights=True frees" in released.reasons[0]
    (half,) = kbit.explain(Norm().eval().half(), x.half(), config=OPTIONS).layers
    assert "float16" in half.reasons[0]
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    with torch.enable_grad(), caplog.at_level("INFO", "kbit_inductor.capture"):
        torch.compile(model, backend="kbit", options=OPTIONS)(x)
    assert "fc: not scaled by what follows, batch_norm: it would get no gradient; call under torch.no_grad()" in caplog.text


def test_a_scale_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    model = nn.Sequential(nn.Linear(64, 48), LayerScale(48))
    with torch.enable_grad():
        torch.compile(model, backend="kbit", options=OPTIONS)(torch.randn(3, 64)).sum().backward()
    assert model[1].gamma.grad is not None


def test_a_changed_statistic_or_weight_is_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    model, x = Norm().eval(), torch.randn(3, 64)
    compiled = torch.compile(model, backend="kbit", options={**OPTIONS, "bits": 8})
    compiled(x)
    for change in (lambda: model.norm.running_var.mul_(4), lambda: model.norm.weight.mul_(3), lambda: model.fc.weight.mul_(-1)):
        before = compiled(x)
        change()
        torch.testing.assert_close(compiled(x), model(x), rtol=0.05, atol=0.1)
        assert not torch.allclose(before, model(x), rtol=0.05, atol=0.1)


def test_a_shared_product_or_weight_keeps_its_scale() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.gamma = nn.Linear(64, 64), nn.Parameter(torch.rand(64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y * self.gamma + y, self.fc(y) * self.gamma

    model, x = Shared().eval(), torch.randn(3, 64)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert not graph.fusions["folded"] and len(graph.context.slots) == 1
    (report,) = kbit.explain(model, x).layers
    assert report.matched and report.reasons == ("not scaled by what follows, mul: other nodes use the weight as it is",)
