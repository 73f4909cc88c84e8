"""A weight that the graph computes from parameters is computed once, when it is packed, and again when one of them changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.packing import pack
from kbit_inductor.testing import assert_equivalent, relative_error
from kbit_inductor.testing.rewriting import rewrite

K, N = 48, 40


class Computed(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(N, K)), nn.Parameter(torch.rand(N, 1) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.function(self.weight, self.scale))


FUNCTIONS = {
    "a scale for each row": lambda w, s: w * s,
    "softmax": lambda w, s: w.softmax(0),
    "a part of it": lambda w, s: (w * s)[8:],
    "a product of low rank": lambda w, s: w + s @ w[:1],
    "a product that gives a vector": lambda w, s: w / (w @ w[0]).norm(),
    "a cast before": lambda w, s: (w.to(torch.bfloat16) * s.to(torch.bfloat16)).float(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_computed_weight_is_packed(name: str) -> None:
    torch._dynamo.reset()
    model = Computed(FUNCTIONS[name])
    assert_equivalent(model, torch.randn(3, 5, K), {"bits": 4}, through_inductor=False)
    (graph,) = rewrite(model, torch.randn(3, 5, K))
    assert set(graph.operators) <= {"kbit.fused_linear_cpu.default"}
    by_name = {layer.name: layer for layer in kbit.explain(model, torch.randn(3, 5, K)).layers}
    assert by_name["weight"].matched, by_name


@pytest.mark.parametrize(
    ("layer", "dim", "shape"),
    [(nn.Linear(K, N), 0, (3, K)), (nn.Conv1d(K, N, 3, groups=2), 2, (2, K, 7)), (nn.Conv2d(K, N, 1), 0, (2, K, 3, 3))],
)
def test_weight_norm_is_packed(layer: nn.Module, dim: int, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(parametrizations.weight_norm(layer, dim=dim)).eval()
    assert_equivalent(model, torch.randn(shape), {"bits": 4, "min_elements": 0}, through_inductor=isinstance(layer, nn.Linear))
    reports = kbit.explain(model, torch.randn(shape), config={"min_elements": 0}).layers
    norm, direction = sorted(reports, key=lambda report: report.name)
    assert direction.matched and not norm.matched
    assert norm.reasons == (f"packed as part of {direction.name}",)


def test_spectral_norm_is_packed() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(K, N))).eval()
    assert_equivalent(model, torch.randn(3, K), {"bits": 4}, through_inductor=False)
    (graph,) = rewrite(model, torch.randn(3, K))
    assert set(graph.operators) <= {"kbit.fused_linear_cpu.default"}


@torch.no_grad()
def test_a_change_of_any_source_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    model = Computed(lambda w, s: w * s)
    compiled, x = torch.compile(model, backend="kbit", options={"bits": 4}), torch.randn(2, K)

    def expected() -> Tensor:
        config = kbit.Config(bits=4).for_layer("weight")
        assert config is not None
        return x @ pack(model.weight * model.scale, config.storage()).dequantize().t()

    bound = 2 * K * 2.0**-24  # of two sums of K terms
    assert relative_error(compiled(x), expected()) < bound
    model.scale.mul_(3)
    assert relative_error(compiled(x), expected()) < bound
    model.weight.add_(1)
    assert relative_error(compiled(x), expected()) < bound
    model.scale.data = torch.ones(N, 1)
    assert relative_error(compiled(x), expected()) < bound


@torch.no_grad()
def test_what_a_computed_weight_comes_from_is_not_released() -> None:
    model = Computed(lambda w, s: w * s)
    torch.compile(model, backend="kbit", options={"bits": 4, "release_weights": True})(torch.randn(2, K))
    assert model.weight.untyped_storage().nbytes() and model.scale.untyped_storage().nbytes()


@torch.no_grad()
def test_a_computed_weight_that_something_else_reads_stays_for_it() -> None:
    model = Computed(lambda w, s: w * s)
    model.forward = lambda x: (lambda w: x @ w.t() + w.sum())(model.weight * model.scale)  # type: ignore[method-assign]
    assert_equivalent(model, torch.randn(3, K), {"bits": 4}, through_inductor=False)
    assert kbit.explain(model, torch.randn(3, K)).matched


class Standardized(nn.Linear):
    eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, functional.layer_norm(self.weight, (K,), eps=self.eps))


@torch.no_grad()
def test_a_number_that_dynamo_makes_an_input_is_known_and_may_change() -> None:
    torch._dynamo.reset()
    model, x = Standardized(K, N, bias=False), torch.randn(3, K)
    (graph,) = rewrite(model, x, dynamic=True)
    assert set(graph.operators) <= {"kbit.fused_linear_cpu.default"}
    compiled = torch.compile(model, backend="kbit", options={"bits": 8, "min_elements": 0, "activation_bits": 16}, dynamic=True)
    for eps in (1e-3, 10.0):
        model.eps = eps
        expected = functional.linear(x, functional.layer_norm(model.weight, (K,), eps=eps))
        assert relative_error(compiled(x), expected) < 0.02  # half of a step of 8 bits, of weights up to 4 deviations, is 1.6 %
