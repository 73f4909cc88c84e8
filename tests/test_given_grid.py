"""Weights that the graph dequantizes, or rounds to a grid: their codes are taken over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of PT2E's graphs
from torch import Tensor, nn
from torch.nn import functional

import kbit_inductor as kbit
from kbit_inductor.testing import assert_equivalent, rewrite
from kbit_inductor.weights.store import STORE

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
OPTIONS = {"bits": 4, "group_size": 16, "min_elements": 0, "activation_bits": 16}
N, K = 40, 48
pt2e = torch.ops.quantized_decomposed


class Quantized(nn.Module):
    """Codes with scales that fit float16 (``exact``), or any."""

    def __init__(self, weight: Callable[[Quantized], Tensor], exact: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        steps = torch.rand(N) / 100 + 0.001
        self.register_buffer("codes", torch.randint(-128, 128, (N, K), dtype=torch.int8))
        self.register_buffer("nibbles", torch.randint(-8, 8, (N, K), dtype=torch.int8))
        self.register_buffer("kernel", torch.randint(-127, 128, (N, 4, 3, 3), dtype=torch.int8))
        self.register_buffer("scale", steps.half().float() if exact else steps)
        self.register_buffer("scales", (torch.rand(N, 3) / 100).half().float())
        self.register_buffer("zero", torch.zeros(N, dtype=torch.int64))
        self.register_buffer("zero32", torch.zeros(N, dtype=torch.int32))
        self.weight = nn.Parameter(torch.randn(N, K) / 20)
        self.make = weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.make(self)
        return functional.linear(x, weight) if weight.dim() == 2 else functional.conv2d(x, weight)


EXACT = {
    "rows": (lambda m: pt2e.dequantize_per_channel(m.codes, m.scale, m.zero, 0, -128, 127, torch.int8), 8),
    "one scale": (lambda m: pt2e.dequantize_per_tensor(m.codes, 2.0**-7, 3, -128, 127, torch.int8), 8),
    "groups of 4 bits": (
        lambda m: pt2e.dequantize_per_channel_group(m.nibbles, m.scales, None, -8, 7, torch.int8, 16, torch.float32), 4,
    ),
    "a kernel": (lambda m: pt2e.dequantize_per_channel(m.kernel, m.scale, m.zero, 0, -127, 127, torch.int8), 8),
    "fake quantization": (
        lambda m: torch.fake_quantize_per_channel_affine(m.weight, m.scale, m.zero32, 0, -8, 7), 4),
    "fake quantization with one scale": (lambda m: torch.fake_quantize_per_tensor_affine(m.weight, 2.0**-6, 1, -4, 3), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_codes_are_taken_over_bit_for_bit(name: str) -> None:
    make, bits = EXACT[name]
    model = Quantized(make)
    wanted = make(model)
    x = torch.randn(3, K) if wanted.dim() == 2 else torch.randn(2, 4, 5, 5)
    (graph,) = rewrite(model, x, config=OPTIONS)
    (slot,) = graph.context.slots
    packed = slot.pack(graph.inputs)
    assert slot.form.config.bits == bits and packed.error == 0
    assert torch.equal(packed.dequantize(), wanted.flatten(1))
    assert not any("quantize" in called for called in graph.operators)
    assert_equivalent(model, x, OPTIONS, through_inductor=False)


def test_scales_that_do_not_fit_are_rounded_and_told() -> None:
    model = Quantized(EXACT["rows"][0], exact=False)
    (layer,) = kbit.explain(model, torch.randn(3, K), config=OPTIONS).matched
    assert layer.name == "codes" and layer.config.bits == 8
    assert 0 < layer.error <= (2.0**-11) ** 2  # half a unit in the last place of float16, squared
    assert_equivalent(model, torch.randn(3, K), OPTIONS, through_inductor=False)


def test_rounding_of_activations_stays_in_the_graph() -> None:
    def rounded(x: Tensor) -> Tensor:
        scheme = (0.05, 0, -128, 127, torch.int8)
        return pt2e.dequantize_per_tensor(pt2e.quantize_per_tensor(x, *scheme), *scheme)

    model = Quantized(EXACT["rows"][0])
    model.forward = lambda x: functional.linear(rounded(x), model.make(model))  # type: ignore[method-assign]
    (graph,) = rewrite(model, torch.randn(3, K), config=OPTIONS)
    assert graph.operators["kbit.fused_linear_cpu.default"] == 1 and len(graph.context.slots) == 1
    assert sum("quantize" in called for called in graph.operators) == 2


def test_a_changed_code_or_scale_is_packed_again() -> None:
    model, x = Quantized(EXACT["rows"][0]), torch.randn(3, K)
    (graph,) = rewrite(model, x, config=OPTIONS)
    (slot,) = graph.context.slots
    for change in (lambda: model.codes.add_(1), lambda: model.scale.mul_(2)):
        before = STORE.pack(graph.inputs, slot)
        change()
        again = STORE.pack(graph.inputs, slot)
        assert again is not before and torch.equal(again.dequantize(), EXACT["rows"][0](model))


LEFT = {
    "columns": lambda m: pt2e.dequantize_per_channel(m.codes, torch.ones(K), torch.zeros(K).long(), 1, -128, 127, torch.int8),
    "skipped": EXACT["rows"][0],
}


@pytest.mark.parametrize("name", LEFT)
def test_other_schemes_stay_in_float(name: str) -> None:
    (graph,) = rewrite(Quantized(LEFT[name]), torch.randn(3, K), config=OPTIONS | {"skip": ["codes"] if name == "skipped" else []})
    assert not graph.context.slots and graph.operators["linear"] == 1
