"""Bags of embeddings: the table is packed, and the sums are those of the packed rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.testing import assert_equivalent, dequantized_copy, relative_error, rewrite

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
OPTIONS = {"bits": 4, "group_size": 16, "min_elements": 0}
LIST, OFFSETS = torch.randint(0, 40, (12,)), torch.tensor([0, 3, 3, 8])
WEIGHTED = {"sum": [LIST, OFFSETS, torch.rand(12)], "rows": [LIST.view(3, 4), None, torch.rand(3, 4)]}

BAGS = {
    "means": ({}, [LIST.view(3, 4)]),
    "sums": ({"mode": "sum"}, [LIST.view(4, 3)]),
    "maxima": ({"mode": "max"}, [LIST.view(4, 3)]),
    "means of parts, one empty": ({}, [LIST, OFFSETS]),
    "sums of parts": ({"mode": "sum"}, [LIST, OFFSETS]),
    "parts with their end": ({"mode": "sum", "include_last_offset": True}, [LIST, torch.tensor([0, 5, 12])]),
    "weighted": ({"mode": "sum"}, WEIGHTED["sum"]),
    "weighted rows": ({"mode": "sum"}, WEIGHTED["rows"]),
    "no bag": ({"mode": "sum"}, [torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)]),
}


class Bag(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 24, **options)

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return self.bag(*inputs)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", BAGS)
def test_the_table_is_packed(name: str, dynamic: bool) -> None:
    options, inputs = BAGS[name]
    model = Bag(**options)
    if dynamic and name in ("means", "maxima"):
        assert "bags of s" in rewrite(model, *inputs, config=OPTIONS, dynamic=True)[0].context.reasons["bag"][0]
        return
    (graph,) = rewrite(model, *inputs, config=OPTIONS, dynamic=dynamic)
    assert graph.operators["kbit.embedding_cpu.default"] == 1 and "embedding_bag" not in graph.operators
    kept = backend.kept_arguments(graph.context, len(graph.inputs))
    (actual,) = backend.Bound(graph.graph.forward, kept, tuple(graph.context.slots))(*graph.inputs)
    expected = dequantized_copy(model)(*inputs)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert relative_error(actual, expected) <= 12 * 2.0**-23  # sums of at most twelve terms, in float32
    assert_equivalent(model, inputs, OPTIONS, through_inductor=False, dynamic=dynamic)


FLOATS = {
    "max_norm": ({"max_norm": 1.0}, "the forward pass writes to it"),
    "padding": ({"padding_idx": 2}, "padding_idx"),
    "maxima of parts": ({"mode": "max"}, "maxima"),
}


@pytest.mark.parametrize("name", FLOATS)
def test_what_stays_in_float_is_explained(name: str) -> None:
    options, reason = FLOATS[name]
    (layer,) = kbit.explain(Bag(**options), LIST, OFFSETS, config=OPTIONS).layers
    assert not layer.matched and reason in layer.reasons[0]


def test_bags_of_half_precision_are_summed_in_float32() -> None:
    model = Bag(mode="sum").bfloat16()
    (graph,) = rewrite(model, LIST.view(1, 12), config=OPTIONS)
    kept = backend.kept_arguments(graph.context, len(graph.inputs))
    (actual,) = backend.Bound(graph.graph.forward, kept, tuple(graph.context.slots))(*graph.inputs)
    exact = graph.context.slots[0].pack(graph.inputs).dequantize()[LIST].sum(0, keepdim=True)
    assert torch.equal(actual, exact.bfloat16())  # rounded once
