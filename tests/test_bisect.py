"""What bisect says of planted faults, and that the program it writes shows them."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch
from torch import nn

import kbit_inductor as kbit
from kbit_inductor import backend
from kbit_inductor.passes import registry
from kbit_inductor.passes.registry import add

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
OPTIONS = {"bits": 5, "group_size": 16, "min_elements": 0}
PLANTED = '''
import kbit_inductor
from torch.nn import functional


@kbit_inductor.register_pass(tier="bounded", after="expand", before="pack")
def careless(gm, context):
    """Drops the bias of products with 48 rows."""
    for node in gm.graph.find_nodes(op="call_function", target=functional.linear):
        if node.meta["example_value"].shape[-1] == 48:
            node.args = (*node.args[:2], None)
'''


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in ((24, 40), (40, 48), (48, 24)))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) * 2
        return x.softmax(-1)


@pytest.fixture
def careless(tmp_path, monkeypatch):
    (tmp_path / "careless_package.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    import careless_package

    add(careless_package.careless)  # a later test finds the module imported
    yield
    registry._by_name.pop("careless", None)
    del sys.modules["careless_package"]


def test_a_planted_fault_is_found_and_the_program_shows_it(careless, tmp_path):
    culprit = kbit.bisect(Model().eval(), torch.randn(3, 24), OPTIONS, tmp_path / "repro")
    assert culprit.broken_pass == "careless"
    assert culprit.layer is None  # it needs no packed weight to be wrong
    assert "what the graph means moved" in culprit.reason
    text = culprit.script.read_text()
    assert text.count("linear(") == 1 and "tanh" not in text  # of ten operators one is left
    with pytest.raises(kbit.BrokenPassError, match="pass 'careless'"):
        runpy.run_path(str(culprit.script))
    del registry._by_name["careless"]
    runpy.run_path(str(culprit.script))  # it was the pass, and nothing else


def test_the_first_layer_that_breaks_is_named(tmp_path, monkeypatch):
    """With a quantized weight that is another one than it was."""
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)
    model = Model().eval()
    x = torch.randn(3, 24)
    assert kbit.bisect(model, x, OPTIONS, tmp_path) is None
    torch.compile(model, backend="kbit", options=OPTIONS)(x)
    model.layers[1].weight.data.mul_(3)  # raises no version
    culprit = kbit.bisect(model, x, OPTIONS, tmp_path)
    assert (culprit.broken_pass, culprit.layer) == (None, "layers.1")
    assert "stale" in culprit.reason
    assert culprit.script is None  # a fresh copy of the weight is packed as it is


def test_without_safetensors_it_says_what_to_install(careless, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(kbit.MissingPackageError, match="pip install safetensors"):
        kbit.bisect(Model().eval(), torch.randn(3, 24), OPTIONS, tmp_path)
