"""What stands between a product and what is fused into it: views, dropout that is off, GELU written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from fusions import Compiled
from torch import Tensor, nn
from torch.nn import functional
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from kbit_inductor.testing import rewrite

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
K, N = 24, 32


class OnRows(nn.Module):
    """A linear layer as GPT-2 has it, behind which something follows."""

    def __init__(self, follows: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(K, N)), nn.Parameter(torch.randn(N))
        self.follows = follows

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, K), self.weight)
        return self.follows(y.view(*x.shape[:-1], N))


GELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "GPT-2": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "Bloom": lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    "BERT": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
}


@pytest.mark.parametrize("name", GELUS)
def test_a_gelu_that_is_written_out_is_fused(name: str) -> None:
    compiled = Compiled(OnRows(GELUS[name]), torch.randn(2, 3, K))
    assert compiled.fusions == {"activation": 1} and compiled.operators == {"kbit.fused_linear_cpu.default": 1}
    assert compiled.error < 1e-5


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "another constant": lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0)))),
    "of two tensors": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x.flip(0) + 0.044715 * torch.pow(x, 3.0)))),
    "dropout that is on": lambda x: functional.dropout(x, 0.5, training=True) + 1,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_something_else_is_left(name: str) -> None:
    (graph,) = rewrite(OnRows(OTHERS[name]), torch.randn(2, 3, K), config={"min_elements": 0})
    assert not graph.fusions and sum(graph.operators.values()) > 1


def test_steps_that_others_read_are_still_computed() -> None:
    def follows(x: Tensor) -> Tensor:
        bent = torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))
        return 0.5 * x * (1.0 + bent) + bent

    compiled = Compiled(OnRows(follows), torch.randn(2, 3, K))
    assert not compiled.fusions and compiled.error < 1e-5


def test_dropout_that_is_off_hides_no_sum() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(K, K), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(self.linear(x))

    compiled = Compiled(Block(), torch.randn(2, 3, K))
    assert compiled.fusions == {"residual": 1} and compiled.operators == {"kbit.fused_linear_cpu.default": 1}
    assert compiled.error < 1e-5


@pytest.mark.parametrize("shape", [(0, 3, K), (1, 1, K), (K,), (2, 1, 3, K)])
def test_views_around_a_product_go(shape: tuple[int, ...]) -> None:
    compiled = Compiled(OnRows(), torch.randn(shape))
    assert compiled.result.shape == (*shape[:-1], N) and compiled.error < 1e-5
    assert compiled.operators == {"kbit.fused_linear_cpu.default": 1}


def test_another_shape_is_kept() -> None:
    class Parts(OnRows):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, K), self.weight).view(-1, 2, N)

    compiled = Compiled(Parts(), torch.randn(2, 4, K))
    assert compiled.result.shape == (4, 2, N) and compiled.error < 1e-5


SIZES = {"n_embd": 32, "hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 16, "use_cache": False}


@pytest.mark.parametrize(
    ("model", "fused"),
    [
        (GPT2LMHeadModel(GPT2Config(**SIZES)), {"activation": 1, "residual": 2, "attention": 1}),
        (BloomForCausalLM(BloomConfig(**SIZES)), {"activation": 1, "residual": 2}),
    ],
    ids=["GPT-2", "Bloom"],
)
def test_a_layer_of(model: nn.Module, fused: dict[str, int]) -> None:
    (graph,) = rewrite(model.eval().requires_grad_(False), torch.randint(64, (2, 10)), config={"min_elements": 0})
    assert graph.fusions == fused
