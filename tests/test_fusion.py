"""Fusions into the CPU's products: that they happened, that the result is the model's, and where they must not happen."""

from __future__ import annotations

import pytest
import torch
from fusions import ACTIVATIONS, OPTIONS, Compiled
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kbit_inductor.testing import dequantized_copy, rewrite

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


def test_a_llama_layer_is_four_calls():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=200
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits

    compiled = Compiled(Logits(), torch.randint(0, 200, (2, 9)))
    assert compiled.fusions == {"siblings": 2 * 5, "gate": 2, "residual": 2 * 2, "norm": 2 * 2 + 1, "attention": 2}
    assert compiled.products() == 2 * 4 + 1  # and the head
    assert compiled.operators["rsqrt"] == 0  # though the head takes a slice of the last norm, it is all of it
    assert compiled.error < 2e-5


class Siblings(nn.Module):
    def __init__(self, *rows: int, bias: bool = True) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(24, n, bias=bias) for n in rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) * (i + 1) for i, part in enumerate(self.parts)], -1)


def test_siblings_of_any_width_become_one_call():
    compiled = Compiled(Siblings(5, 16, 1), torch.randn(3, 24))
    assert compiled.fusions == {"siblings": 3} and compiled.products() == 1
    assert compiled.error < 1e-5


def test_siblings_may_differ_in_bits():
    compiled = Compiled(Siblings(5, 16), torch.randn(3, 24), overrides={"parts.1": {"bits": 2}})
    assert compiled.fusions == {"siblings": 2} and compiled.error < 1e-5


@pytest.mark.parametrize("override", [{"group_size": 8}, {"activation_bits": 8}])
def test_siblings_that_read_x_differently_stay_apart(override):
    compiled = Compiled(Siblings(5, 16), torch.randn(3, 24), overrides={"parts.1": override})
    assert not compiled.fusions and compiled.products() == 2


class Sandwich(nn.Module):
    """A product between other operations, given as functions."""

    def __init__(self, before=lambda x: x, after=lambda y, x: y) -> None:
        super().__init__()
        self.linear, self.before, self.after = nn.Linear(24, 24), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(self.before(x)), x)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_fused(name, dtype):
    module = Sandwich(after=lambda y, x: ACTIVATIONS[name](y)).to(dtype)
    compiled = Compiled(module, torch.randn(3, 24).to(dtype))
    assert compiled.fusions == {"activation": 1}
    assert compiled.operators == {"kbit.fused_linear_cpu.default": 1}
    assert compiled.error < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Tanh(), nn.Sigmoid()], ids=lambda m: str(m)
)
def test_activation_modules_are_fused(module):
    assert Compiled(nn.Sequential(nn.Linear(24, 24), module), torch.randn(3, 24)).fusions == {"activation": 1}


@pytest.mark.parametrize("how", [lambda y, x: y + x, lambda y, x: x + y, lambda y, x: torch.add(x, y), lambda y, x: y.add(x)])
def test_residual_sums_are_fused(how):
    compiled = Compiled(Sandwich(after=how), torch.randn(3, 24))
    assert compiled.fusions == {"residual": 1} and len(compiled.operators) == 1 and compiled.error < 1e-5


@pytest.mark.parametrize("how", [lambda y: y.float(), lambda y: y.to(torch.float16), lambda y: y.type(torch.float32)])
def test_casts_of_the_result_are_fused(how):
    module = Sandwich(after=lambda y, x: how(functional.silu(y))).to(torch.bfloat16)
    x = torch.randn(3, 24).bfloat16()
    compiled = Compiled(module, x)
    assert compiled.fusions == {"activation": 1, "cast": 1} and len(compiled.operators) == 1
    assert compiled.result.dtype == how(x).dtype and compiled.error < torch.finfo(torch.bfloat16).eps


def test_a_residual_of_another_dtype_is_fused():
    module = Sandwich(after=lambda y, x: y + x.float()).to(torch.bfloat16)
    compiled = Compiled(module, torch.randn(3, 24).bfloat16())
    assert compiled.fusions == {"residual": 1} and compiled.operators == {"kbit.fused_linear_cpu.default": 1, "float": 1}
    assert compiled.result.dtype == torch.float32 and compiled.error < torch.finfo(torch.bfloat16).eps


def test_casts_in_front_are_fused_where_activations_are_rounded():
    module = Sandwich(before=lambda x: x.bfloat16(), after=lambda y, x: y + x)
    module.linear.bfloat16()
    x = torch.randn(3, 24)
    rounding = Compiled(module, x, activation_bits=8)
    assert rounding.fusions == {"cast": 1, "residual": 1} and len(rounding.operators) == 1
    exact = Compiled(module, x, activation_bits=16)
    assert exact.fusions == {"residual": 1} and exact.operators == {"kbit.fused_linear_cpu.default": 1, "bfloat16": 1}
    for compiled in (rounding, exact):
        assert compiled.result.dtype == torch.float32
    assert exact.error < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "how", [lambda y: y.double(), lambda y: y.to(torch.float32), lambda y: torch.stack([y.bfloat16().float(), y])]
)
def test_casts_that_are_not_fused(how):
    compiled = Compiled(Sandwich(after=lambda y, x: how(y)), torch.randn(3, 24))
    assert not compiled.fusions and compiled.error < 20 * torch.finfo(torch.bfloat16).eps


class Gated(nn.Module):
    def __init__(self, act, swapped: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.act, self.swapped = act, swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.act(self.gate(x)), self.up(x)
        return x + self.down(up * gate if self.swapped else gate * up)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("swapped", [False, True])
def test_gates_are_fused(name, swapped):
    compiled = Compiled(Gated(ACTIVATIONS[name], swapped), torch.randn(3, 24))
    assert compiled.fusions == {"siblings": 2, "gate": 1, "residual": 1}
    assert compiled.operators == {"kbit.fused_linear_cpu.default": 2}
    assert compiled.error < 1e-5


class Norm(nn.Module):
    """The RMS norm as transformers spells it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + 1e-6)).to(dtype)


@pytest.mark.parametrize("norm", [Norm(24), nn.RMSNorm(24, eps=1e-6)], ids=["transformers", "torch"])
def test_rms_norms_are_fused_in_front(norm):
    compiled = Compiled(nn.Sequential(norm, nn.Linear(24, 30)), torch.randn(3, 24))
    assert compiled.fusions == {"norm": 1} and len(compiled.operators) == 1 and compiled.error < 1e-5


def test_the_eps_of_a_norm_may_be_an_input_of_the_graph():
    class WithEps(Norm):
        eps = 1e-6

        def forward(self, hidden: Tensor) -> Tensor:
            return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps))

    module = nn.Sequential(WithEps(24), nn.Linear(24, 30)).eval()
    (graph,) = rewrite(module, torch.randn(3, 24), config=OPTIONS, dynamic=True)
    assert any("eps" in placeholder.name for placeholder in graph.graph.graph.find_nodes(op="placeholder"))
    assert graph.fusions == {"norm": 1} and graph.operators == {"kbit.fused_linear_cpu.default": 1}


def test_a_norm_that_others_read_is_computed_for_them_too():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = Norm(24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return self.linear(normed) * normed

    compiled = Compiled(Shared(), torch.randn(3, 24))
    assert compiled.error < 1e-5


NOT_FUSED = {
    "a product read twice": Sandwich(after=lambda y, x: functional.relu(y) + y.sum()),
    "a sum that broadcasts": Sandwich(after=lambda y, x: y + x[:1]),
    "a sum of another dtype": Sandwich(after=lambda y, x: y + x.double()),
    "a sum with alpha": Sandwich(after=lambda y, x: torch.add(y, x, alpha=2)),
    "a number": Sandwich(after=lambda y, x: y + 1.0),
    "a product with itself": Sandwich(after=lambda y, x: y + y),
    "a norm over another dimension": Sandwich(before=lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)),
    "in place on the product": Sandwich(after=lambda y, x: functional.relu_(y)),
    "a residual that is written": Sandwich(after=lambda y, x: y + x.clone().mul_(2)),
    "a sum into the residual": Sandwich(after=lambda y, x: (x.clone().__iadd__(y), y)[0]),
}


@pytest.mark.parametrize("name", sorted(NOT_FUSED))
def test_what_looks_alike_is_not_fused(name):
    compiled = Compiled(NOT_FUSED[name], torch.randn(3, 24))
    assert not compiled.fusions and compiled.products() == 1
    assert compiled.error < 1e-5


def test_an_x_that_is_written_between_siblings():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.first(x)
            x.mul_(3)
            return first + self.second(x)

    compiled = Compiled(Written(), torch.randn(3, 24))
    assert not compiled.fusions["siblings"] and compiled.error < 1e-5


def test_a_bias_that_is_written_behind_its_product():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 24) / 5)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            bias = bias.clone()
            y = functional.linear(x, self.weight, bias)
            bias.add_(1)
            return functional.relu(y)

    compiled = Compiled(Written(), torch.randn(3, 24), torch.randn(24))
    assert not compiled.fusions and compiled.error < 1e-5


def test_a_norm_of_bfloat16_stays_apart():
    """Between its steps it rounds, which the fused one would not."""
    compiled = Compiled(nn.Sequential(Norm(24), nn.Linear(24, 30)).bfloat16(), torch.randn(3, 24).bfloat16())
    assert not compiled.fusions


def test_nothing_is_fused_where_gradients_are_wanted():
    module = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
    with torch.enable_grad():
        x = torch.randn(3, 24, requires_grad=True)
        compiled = torch.compile(module, backend="kbit", options=OPTIONS)
        (ours,) = torch.autograd.grad(compiled(x).sum(), x)
        (plain,) = torch.autograd.grad(dequantized_copy(module)(x).sum(), x)
    torch.testing.assert_close(ours, plain)


@pytest.mark.rounded_activations
def test_the_default_rounds_activations_to_eight_bits():
    compiled = Compiled(nn.Sequential(nn.Linear(256, 64)), torch.randn(30, 256))
    assert 1e-3 < compiled.error < 1e-2
    exact = Compiled(nn.Sequential(nn.Linear(256, 64)), torch.randn(30, 256), activation_bits=16)
    assert exact.error < 1e-6
