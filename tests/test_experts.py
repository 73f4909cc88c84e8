"""Products with a batch of matrices are matched however they are spelled, and so are the experts of transformers' models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.weights.release import is_released
from kbit_inductor.weights.store import STORE

E, N, K, S = 3, 40, 48, 7
INDEX = [2, 0, 0, 1, 2, 0, -3]

# The shape of the weight, and x [S, K] times it. Batches are made of rows of x.
SPELLINGS = {
    "bmm": ((E, K, N), lambda x, w, i: torch.bmm(x[:6].view(E, 2, K), w)),
    "bmm of mT": ((E, N, K), lambda x, w, i: torch.bmm(x[:6].view(E, 2, K), w.mT)),
    "bmm, weight on the left": ((E, N, K), lambda x, w, i: torch.bmm(w, x[:6].view(E, 2, K).mT)),
    "baddbmm": ((E, K, N), lambda x, w, i: torch.baddbmm(x[:2, :N], x[:6].view(E, 2, K), w, beta=0.5, alpha=2)),
    "matmul": ((E, K, N), lambda x, w, i: x[:6].view(E, 2, K) @ w),
    "matmul that repeats x": ((E, N, K), lambda x, w, i: x @ w.transpose(1, 2)),
    "matmul of four dimensions": ((2, E, N, K), lambda x, w, i: x[:6].view(2, E, 1, K) @ w.mT),
    "einsum": ((E, N, K), lambda x, w, i: torch.einsum("bmk,bnk->bmn", x[:6].view(E, 2, K), w)),
    "part of each matrix": ((E, N, 2 * K), lambda x, w, i: torch.bmm(x[:6].view(E, 2, K), w[:, :, K:].mT)),
    "some matrices": ((2 * E, N, K), lambda x, w, i: torch.bmm(x[:6].view(E, 2, K), w[E:].mT)),
    "picked, bmm": ((E, N, K), lambda x, w, i: torch.bmm(w[i], x.unsqueeze(2)).squeeze(2)),
    "picked, bmm on the right": ((E, K, N), lambda x, w, i: torch.bmm(x.unsqueeze(1), w[i])),
    "picked, matmul": ((E, N, K), lambda x, w, i: x.unsqueeze(1) @ w[i].transpose(1, 2)),
    "picked, einsum": ((E, N, K), lambda x, w, i: torch.einsum("sk,snk->sn", x, w[i])),
    "picked by two dimensions": (
        (E, N, K),
        lambda x, w, i: torch.einsum("tak,tank->tan", x[:6].view(3, 2, K), w[i[:6].view(3, 2)]),
    ),
    "picked by index_select": ((E, N, K), lambda x, w, i: torch.bmm(x.unsqueeze(1), w.index_select(0, i % E).mT)),
    "picked from a transpose": ((E, K, N), lambda x, w, i: torch.bmm(w.mT[i], x.unsqueeze(2))),
    "part of what is picked": ((E, 2 * N, K), lambda x, w, i: torch.bmm(w[i][:, N:], x.unsqueeze(2))),
    "picked and cast": ((E, N, K), lambda x, w, i: torch.bmm(w[i].bfloat16(), x.bfloat16().unsqueeze(2)).float()),
}


class Product(nn.Module):
    def __init__(self, shape, function):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(shape) / 8, requires_grad=False)
        self.function = function

    def forward(self, x, index):
        return self.function(x, self.experts, index)


@pytest.fixture
def without_inductor(monkeypatch):
    """Run the rewritten graph as it is: these tests are about the rewrite."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)


def matched(model, *inputs):
    """The report of the one weight of ``model``, which must be packed, and the results with it and with its dequantized copy."""
    with torch.no_grad():
        (layer,) = kbit.explain(model, *inputs).layers
        actual = torch.compile(model, backend="kbit", fullgraph=True)(*inputs)
        expected = dequantized_copy(model)(*inputs)
    assert layer.matched
    assert not layer.reasons
    return layer, actual, expected


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_matched(name, without_inductor):
    model, x, index = Product(*SPELLINGS[name]), torch.randn(S, K), torch.tensor(INDEX)
    layer, actual, expected = matched(model, x, index)
    assert layer.uses == ("batched_linear",)
    assert layer.bytes_after < layer.bytes_before / 4
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < (2.0**-7 if "cast" in name else 1e-5)


@pytest.mark.parametrize("product", [functional.grouped_mm, torch._grouped_mm])
def test_grouped_products_are_matched(product, without_inductor):
    model = Product((E, N, K), lambda x, w, offsets: product(x, w.mT, offs=offsets)).bfloat16()
    x, offsets = torch.randn(S, K, dtype=torch.bfloat16), torch.tensor([3, 3, S], dtype=torch.int32)
    layer, actual, expected = matched(model, x, offsets)
    assert layer.uses == ("grouped_linear",)
    assert layer.shape == (E, N, K)
    # The dequantized weight is rounded to bfloat16, and so are both results.
    assert relative_error(actual, expected) < torch.finfo(torch.bfloat16).eps


def test_experts_and_their_neighbours_share_a_packed_batch(without_inductor):
    model = Product((E, N, K), lambda x, w, i: torch.bmm(w[i], x.unsqueeze(2)).squeeze(2) + (x[:6].view(E, 2, K) @ w.mT).sum())
    x, index = torch.randn(S, K), torch.tensor(INDEX)
    with torch.no_grad():
        (layer,) = kbit.explain(model, x, index).layers
    assert sorted(layer.uses) == ["batched_linear", "batched_linear"]


def _changed_index(x, w, i):
    i = i.clone()
    picked = w[i]
    i.zero_()
    return torch.bmm(picked, x.unsqueeze(2))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w, i: w[i].sum(1) * x[:, :1], "used by sum, which is no matrix product"),
        (_changed_index, "no matrix product"),
    ],
)
def test_what_is_not_matched_stays_in_float_and_says_why(function, reason, without_inductor):
    model, x, index = Product((E, N, K), function), torch.randn(S, K), torch.tensor(INDEX)
    with torch.no_grad():
        (layer,) = kbit.explain(model, x, index).layers
        actual = torch.compile(model, backend="kbit")(x, index)
        torch.testing.assert_close(actual, model(x, index))
    assert not layer.matched
    assert any(reason in told for told in layer.reasons), layer.reasons


@pytest.mark.parametrize("grad", [False, True])
def test_gradients_pass_through_experts(grad, without_inductor):
    model, index = Product(*SPELLINGS["picked, bmm"]), torch.tensor(INDEX)
    x = torch.randn(S, K, requires_grad=grad)
    compiled = torch.compile(model, backend="kbit")
    with torch.set_grad_enabled(grad):
        actual = compiled(x, index)
        assert actual.requires_grad == grad
        if grad:
            expected = torch.autograd.grad(dequantized_copy(model)(x, index).square().sum(), x)
            torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_experts_of_qwen2_moe_without_their_floats():
    config = Qwen2MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=40, shared_expert_intermediate_size=48, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=64, use_cache=False,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).eval()
    model.set_experts_implementation("batched_mm")  # grouped_mm, the default, is Mixtral's in test_transformers.py
    texts = [torch.randint(0, 64, (1, length)) for length in (6, 9)]
    floats = [model(text).logits for text in texts]
    options = kbit.Config(bits=4, group_size=16, release_weights=True)
    report = kbit.explain(model, texts[0], config=options)
    names = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    layers, weights = [report.layer(name) for name in names], [model.get_parameter(name) for name in names]
    assert [layer.shape for layer in layers] == [(4, 80, 32), (4, 32, 40)]
    assert all(layer.uses == ("batched_linear",) and not layer.reasons for layer in layers)

    compiled = torch.compile(model, backend="kbit", dynamic=True, fullgraph=True, options=options)
    actual = [compiled(text).logits for text in texts]
    assert all(is_released(weight) for weight in weights)
    packed = [sum(form.nbytes for _, form in STORE.packed_forms(weight)) for weight in weights]
    assert packed == [layer.bytes_after for layer in layers]
    kbit.restore_(model)
    for ours, text, before in zip(actual, texts, floats, strict=True):
        dequantized = model(text).logits
        assert relative_error(ours, dequantized) < 1e-5
        assert relative_error(dequantized, before) > 1e-2  # or the line above would not tell the two apart
