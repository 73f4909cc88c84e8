"""Modules of torch that run as one call: encoder layers in eval mode, and recurrent ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.passes.pipeline import BUILT_IN
from kbit_inductor.testing import assert_equivalent, rewrite

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
OPTIONS = {"bits": 4, "group_size": 16, "min_elements": 0, "activation_bits": 16}
CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def layer(**options: object) -> nn.Module:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options).eval()
    for norm in (made.norm1, made.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return made


@pytest.mark.parametrize(
    ("options", "masks"),
    [({}, ()), ({}, (CAUSAL,)), ({}, (None, PADDING)), ({"norm_first": True, "activation": "gelu"}, (CAUSAL, PADDING))],
    ids=["relu", "causal", "padding", "gelu, norm first, both masks"],
)
def test_an_encoder_layer_is_its_products(options: dict[str, object], masks: tuple[torch.Tensor, ...]) -> None:
    model, x = layer(**options), torch.randn(2, 5, 32)
    passes = [each for each in BUILT_IN if each.name != "chain"]
    (graph,) = rewrite(model, x, *masks, config=OPTIONS, passes=passes)
    assert graph.fusions["written out"] == 1 and graph.operators["kbit.fused_linear_cpu.default"] == 4
    assert graph.fusions["residual"] == 2 and graph.fusions["activation"] == 1
    torch.testing.assert_close(graph.captured(*graph.inputs)[0], model(x, *masks))  # what is compared with next is the model's
    assert_equivalent(model, (x, *masks), OPTIONS, through_inductor=False)


def test_a_whole_transformer_is_packed() -> None:
    model = nn.Transformer(32, 4, 2, 2, 48, batch_first=True).eval()
    found = kbit.explain(model, torch.randn(2, 5, 32), torch.randn(2, 3, 32), config=OPTIONS)
    # Of the attention between the two, queries take one part of a weight, keys and values the other.
    assert len(found.matched) == len(found.layers) == 2 * 4 + 2 * (4 + 3) and not found.graph_breaks


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
def test_recurrent_layers_are_traced_where_dynamo_is_asked_to(make: type[nn.Module]) -> None:
    model, x = make(16, 24, batch_first=True).eval(), torch.randn(2, 5, 16)
    left = kbit.explain(model, x, config=OPTIONS)
    assert not left.matched and all(layer.reasons == ("no captured graph uses it",) for layer in left.layers)
    assert any("RNN, GRU, or LSTM" in reason for reason in left.graph_breaks)
    with torch._dynamo.config.patch(allow_rnn=True):
        (graph,) = rewrite(model, x, config=OPTIONS)
        products = graph.operators["kbit.fused_linear_cpu.default"] + graph.fusions["chained"]
        assert products == 1 + 5  # of the input at once, of the state at each step
        assert len(graph.context.slots) == 2
        assert_equivalent(model, x, OPTIONS, through_inductor=False)


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells_are_packed(make: type[nn.Module]) -> None:
    model, x = make(16, 24), torch.randn(2, 16)
    assert all(layer.matched for layer in kbit.explain(model, x, config=OPTIONS).layers)
    assert_equivalent(model, x, OPTIONS, through_inductor=False)
