"""LoRA adapters in the forward pass: a low-rank term of few calls, or part of the weight where the model sums weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.testing import assert_equivalent, relative_error, rewrite

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
OPTIONS = {"bits": 4, "group_size": 16, "min_elements": 0, "activation_bits": 16}


class Adapted(nn.Module):
    """As PEFT computes it."""

    def __init__(self, rank: int = 4, scaling: float = 2.0) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(48, 40), nn.Linear(48, rank, bias=False), nn.Linear(rank, 40, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * self.scaling


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Adapted() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def bits(model: nn.Module, **options: object) -> dict[str, int]:
    layers = kbit.explain(model, torch.randn(3, 48), config={**OPTIONS, **options}).layers
    return {layer.name: layer.config.bits for layer in layers if layer.config is not None}


def test_an_adapter_costs_one_call_more() -> None:
    model, x = Attention().eval(), torch.randn(3, 48)
    graph = rewrite(model, x, config=OPTIONS, passes=[each for each in backend.passes() if each.name != "chain"])[0]
    assert graph.fusions == {"folded": 3, "siblings": 6, "residual": 3}
    assert graph.operators == {"kbit.fused_linear_cpu.default": 1 + 3, "narrow": 6, "cat": 1}
    assert_equivalent(model, x, OPTIONS, through_inductor=False)


def test_adapters_have_eight_bits() -> None:
    assert bits(Adapted()) == {"base": 4, "a": 8, "b": 8}
    assert bits(Adapted(scaling=1.0)) == {"base": 4, "a": 8, "b": 8}
    assert bits(Adapted(), overrides={"a": {"bits": 3}}) == {"base": 4, "a": 3, "b": 8}
    assert bits(kbit.quantize_(Adapted(), OPTIONS | {"skip": ["a", "b"]})) == {"base": 4, "a": 8, "b": 8}
    assert bits(Adapted(rank=24)) == {"base": 4, "a": 4, "b": 4}  # no low rank


@pytest.mark.parametrize(
    "function",
    [lambda y, z, x: y * z, lambda y, z, x: x[..., :40] + z, lambda y, z, x: y + z.relu()],
    ids=["a product", "of no base", "with an activation"],
)
def test_what_only_looks_like_an_adapter_keeps_its_bits(function) -> None:
    model = Adapted()
    model.forward = lambda x: function(model.base(x), model.b(model.a(x)), x)
    assert set(bits(model).values()) == {4}


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(48, 40), nn.Parameter(torch.randn(4, 48)), nn.Parameter(torch.randn(40, 4))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.base.weight + 2.0 * (self.b @ self.a), self.base.bias)


def test_a_sum_of_weights_is_packed_as_one() -> None:
    model, x = Summed(), torch.randn(3, 48)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert graph.operators == {"kbit.fused_linear_cpu.default": 1}
    assert_equivalent(model, x, OPTIONS, through_inductor=False)
    base, *adapter = kbit.explain(model, x, config=OPTIONS).layers
    assert base.matched and [layer.reasons for layer in adapter] == [("packed as part of base",)] * 2


def test_a_merged_adapter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    model = nn.Sequential(nn.Linear(48, 40))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).eval()
    compiled, x = torch.compile(model, backend="kbit", options=OPTIONS | {"bits": 8}), torch.randn(3, 48)
    kept = compiled(x)
    model.merge_adapter(safe_merge=True)  # without, PEFT adds to weight.data in place, which nothing can see
    merged = compiled(x)
    exact, base = model(x), model.get_base_model()[0].base_layer
    assert relative_error(base(x), exact) < 1e-6 and not torch.equal(kept, merged)
    assert relative_error(kept, exact) < 0.02 and relative_error(merged, exact) < 0.02  # what is promised for 8 bits
