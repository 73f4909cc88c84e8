"""Tables and heads get no fewer bits than ``end_bits``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.models.surgery import packed_matrices

IDS = torch.arange(12).view(2, 6)


class Model(nn.Module):
    def __init__(self, tied=False, classes=48):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(48, 32), nn.Linear(32, 32), nn.Linear(32, classes)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.relu(self.body(self.table(ids))))


def bits_of(model, options):
    """The bits of each layer, as the backend has them, which are those of ``quantize_``."""
    found = {layer.name: layer.config.bits for layer in kbit.explain(model, IDS, config=options).layers if layer.config}
    kbit.quantize_(model, options)
    swapped = {name: matrix.config.bits for matrix, names in packed_matrices(model).items() for name in names}
    assert {name: swapped[name] for name in found} == found
    return swapped


@pytest.mark.parametrize(
    ("model", "options", "wanted"),
    [
        (Model(), {}, (6, 4, 6)),
        (Model(tied=True), {}, (6, 4, 6)),
        (Model(classes=40), {}, (6, 4, 4)),
        (Model(), {"bits": 8}, (8, 8, 8)),
        (Model(), {"bits": 2, "end_bits": 1}, (2, 2, 2)),
        (Model(), {"bits": 2, "end_bits": 3, "overrides": {"head": {"bits": 1}}}, (3, 2, 1)),
        (Model(), {"overrides": {"head": {"group_size": 16}}}, (6, 4, 6)),
    ],
    ids=["untied", "tied", "no head", "more", "no floor", "overrides", "other overrides"],
)
def test_ends_get_no_fewer(model, options, wanted, one_thread_without_grad):
    assert bits_of(model, options) == dict(zip(("table", "body", "head"), wanted, strict=True))


def test_what_raised_the_bits_is_told(one_thread_without_grad):
    found = kbit.explain(Model(tied=True), IDS, config={"bits": 3, "end_bits": 5})
    assert "end_bits=5 in place of bits=3" in str(found)
    assert [layer.name for layer in found.matched if any("end_bits" in why for why in layer.reasons)] == ["table"]
    assert not any(layer.reasons for layer in kbit.explain(Model(), IDS, config={"bits": 6}).matched)


def test_a_plan_without_data_tells_of_its_floor():
    plan = kbit.plan(Model(), {"bits": "auto", "average_bits": 3})
    assert "tables and the head no fewer than uniform 3 bits" in plan.verdict


def test_a_plan_weighs_ends_itself(one_thread_without_grad):
    options = {"bits": "auto", "average_bits": 2, "end_bits": 8}
    plan = kbit.plan(Model(), options, IDS)
    assert max(layer.bits for layer in plan.layers) < 8


def test_a_model_without_a_table_has_no_ends(one_thread_without_grad):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    kbit.quantize_(model, {"bits": 3})
    assert {matrix.config.bits for matrix in packed_matrices(model)} == {3}


@pytest.mark.parametrize("value", [0, 9, 4.0, True])
def test_a_floor_is_a_number_of_bits(value):
    with pytest.raises(kbit.InvalidOptionError, match="end_bits"):
        kbit.Config(end_bits=value)
