"""Products with a batch of matrices are matched however they are spelled, and so are the experts of transformers' models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.testing import dequantized_copy, relative_error

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


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_matched(name, without_inductor):
    model, x, index = Product(*SPELLINGS[name]), torch.randn(S, K), torch.tensor(INDEX)
    with torch.no_grad():
        (layer,) = kbit.explain(model, x, index).layers
        actual = torch.compile(model, backend="kbit", fullgraph=True)(x, index)
        expected = dequantized_copy(model)(x, index)
    assert layer.matched
    assert not layer.reasons
    assert layer.uses == ("batched_linear",)
    assert layer.bytes_after < layer.bytes_before / 4
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < (2.0**-7 if "cast" in name else 1e-5)
