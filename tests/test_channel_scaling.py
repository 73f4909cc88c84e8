"""Channels scaled between layers: the model computes what it did, what is quantized loses less, and what cannot be is told."""

from __future__ import annotations

from collections.abc import Callable

import models
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kbit_inductor as kbit
from kbit_inductor.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
OPTIONS = {"bits": 3, "group_size": 16, "min_elements": 0}


def data(columns: int = 32) -> Tensor:
    return torch.randn(64, columns) * torch.logspace(-1.5, 1.5, columns)[torch.randperm(columns)]


class Block(nn.Module):
    def __init__(self, norm: nn.Module, act: Callable[[Tensor], Tensor], gated: bool, bias: bool) -> None:
        super().__init__()
        self.norm, self.act = norm, act
        self.up, self.down = nn.Linear(32, 48, bias=bias), nn.Linear(48, 32, bias=bias)
        self.gate = nn.Linear(32, 48, bias=bias) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        inner = self.up(y) if self.gate is None else self.act(self.gate(y)) * self.up(y)
        return x + self.down(functional.dropout(inner if self.gate else self.act(inner), 0.1, self.training))


def blocks() -> dict[str, tuple[Block, list[list[str]]]]:
    both = [["up"], ["down"]]
    return {
        "relu": (Block(nn.LayerNorm(32), functional.relu, False, True), both),
        "gelu": (Block(nn.LayerNorm(32, bias=False), functional.gelu, False, False), [["up"]]),
        "gated": (Block(nn.RMSNorm(32, eps=1e-6), functional.silu, True, False), [["gate", "up"], ["down"]]),
        "no weight": (Block(nn.LayerNorm(32, elementwise_affine=False), functional.relu, False, True), [["down"]]),
        "no norm": (Block(nn.Identity(), functional.relu, False, True), [["down"]]),
    }


@pytest.mark.parametrize("name", blocks())
def test_the_model_computes_what_it_did_and_loses_less(name: str) -> None:
    block, scaled = blocks()[name]
    for parameter in block.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    x, model = data(), nn.Sequential(block).eval()
    wanted, before = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    told = kbit.scale_channels_(model, x.split(16), OPTIONS)
    # Each scale is divided by and multiplied with: two roundings of float32 before sums of squares of 48 terms at most.
    assert relative_error(model(x), wanted) < 8 * 2.0**-24 * 48
    done = [list(layer.names) for layer in told.layers if layer.power]
    assert {tuple(names) for names in done} <= {tuple(f"0.{each}" for each in names) for names in scaled} and done
    for layer in told.layers:
        assert (layer.after < layer.before) == bool(layer.power) and layer.reason
        for each in layer.names if layer.power else ():
            assert not torch.equal(before[f"{each}.weight"], model.state_dict()[f"{each}.weight"])


def test_a_llama_is_scaled_at_its_norms_and_between_the_products_of_its_mlp() -> None:
    model, ids = models.llama().eval(), models.ids()
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.copy_(torch.logspace(-1, 1, len(parameter)))
    wanted = model(ids).logits
    told = kbit.scale_channels_(model, {"input_ids": ids}, OPTIONS)
    assert relative_error(model(ids).logits, wanted) < 1e-5
    by_name = {layer.names[0].split(".")[-1]: layer for layer in told.layers}
    assert by_name["q_proj"].power and by_name["gate_proj"].power
    assert "input_layernorm" in by_name["q_proj"].reason and len(by_name["q_proj"].names) == 3
    assert "no norm and no product" in by_name["o_proj"].reason
    assert "up_proj" in by_name["down_proj"].reason or not by_name["down_proj"].power
    assert "o_proj" in str(told)


class Shared(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.a, self.b = how, nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        if how == "weight of two":
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.how == "read by a sum":
            return self.a(y) + y
        if self.how == "norm used twice":
            return self.a(y) + self.norm(x + 1)
        if self.how == "called twice":
            return self.a(functional.silu(self.a(y)))
        if self.how == "graph break":
            torch._dynamo.graph_break()
        return self.a(y) + self.b(functional.silu(y + 1) if self.how == "weight of two" else y)


@pytest.mark.parametrize("how", ["read by a sum", "norm used twice", "called twice", "weight of two", "graph break"])
def test_what_something_else_uses_stays(how: str) -> None:
    model, x = Shared(how).eval(), data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told = kbit.scale_channels_(model, x, OPTIONS)
    assert told.layers and all(layer.reason and not layer.power for layer in told.layers)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_layers_that_stay_in_float_go_along_and_no_data_is_an_error() -> None:
    model, x = Shared("").eval(), data()
    wanted = model(x)
    told = kbit.scale_channels_(model, x, {**OPTIONS, "skip": ["b"], "quantizer": "distill"})
    assert [layer.names for layer in told.layers] == [("a", "b")] and relative_error(model(x), wanted) < 1e-5
    assert kbit.scale_channels_(model, x, {**OPTIONS, "skip": ["a", "b"]}).layers[0].reason == "skipped by the option 'skip'"
    with pytest.raises(kbit.EmptyCalibrationError, match="no batch"):
        kbit.scale_channels_(model, [], OPTIONS)
