"""Debug mode as a user meets it: by option or environment, in the log, and as an error."""

from __future__ import annotations

import logging
import operator

import pytest
import torch
from torch import nn

import kbit_inductor as kbit
from kbit_inductor import backend

pytestmark = pytest.mark.usefixtures("one_thread_without_grad", "unregister")
OPTIONS = {"bits": 4, "min_elements": 0}


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: gm.forward)


def model():
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval().requires_grad_(False)


def drop_bias(gm, context):
    for node in gm.graph.find_nodes(op="call_function", target=nn.functional.linear):
        node.args = (*node.args[:2], None)


def compiled(**options):
    torch._dynamo.reset()  # or the graph of an earlier call would serve
    return torch.compile(model(), backend="kbit", options=OPTIONS | options)(torch.randn(30, 24))


def test_a_broken_pass_is_an_error_by_option_and_by_environment(monkeypatch):
    kbit.register_pass(drop_bias, tier="bounded", before="pack")
    compiled()  # nobody looks
    with pytest.raises(kbit.BrokenPassError, match=r"pass 'drop_bias' is bounded.* first at node 'input_1'"):
        compiled(debug=True)
    monkeypatch.setenv("KBIT_DEBUG", "1")
    with pytest.raises(kbit.BrokenPassError, match="pass 'drop_bias'"):
        compiled()
    monkeypatch.setenv("KBIT_DEBUG", "0")
    compiled()


def test_the_log_says_what_each_pass_did(caplog):
    with caplog.at_level(logging.INFO, "kbit_inductor.passes"):
        compiled(debug=True)
    lines = [record.getMessage() for record in caplog.records if record.name == "kbit_inductor.passes"]
    assert [line.split(" ", 1)[0] for line in lines] == ["select", "fold", "expand", "pack", "fuse", "chain", "cleanup"]
    assert "kbit.linear_cpu.default 0 -> 2" in lines[3] and "linear 2 -> 0" in lines[3]
    assert "relu 1 -> 0" in lines[4] and "moved by" in lines[4]
    assert "no operator changed" in lines[6]


def test_a_released_model_is_compiled_and_not_checked(caplog):
    released = model()
    x = torch.randn(30, 24)
    torch.compile(released, backend="kbit", options=OPTIONS | {"release_weights": True})(x)
    with caplog.at_level(logging.WARNING, "kbit_inductor.passes"):
        kbit.explain(released, x, config=OPTIONS | {"release_weights": True, "debug": True})
    assert "passes are not checked on numbers" in caplog.text


def test_debug_is_true_or_false():
    with pytest.raises(kbit.InvalidOptionError, match="'debug' is 1; give True or False"):
        kbit.Config(debug=1)


def test_a_written_state_keeps_its_value():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(24, 24)
            self.register_buffer("count", torch.zeros(24))

        def forward(self, x):
            self.count.add_(1)
            return self.linear(x) + self.count

    counter = Counter().eval().requires_grad_(False)
    torch.compile(counter, backend="kbit", options=OPTIONS | {"debug": True})(torch.randn(3, 24))
    assert counter.count.eq(1).all()  # by the call, and not by the checks


def test_a_model_that_was_packed_before_is_checked_too():
    packed = model()
    kbit.quantize_(packed, OPTIONS)
    report = torch.compile(packed, backend="kbit", options=OPTIONS | {"debug": True})(torch.randn(30, 24))
    assert report.shape == (30, 24)


def test_luck_in_a_sum_that_cancels_is_no_measure_for_the_passes_after_it():
    """Whole numbers are added exactly. A pass that rounds one of them moves the small difference by many units."""

    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large, self.other = (nn.Parameter(n + torch.arange(24.0)) for n in (1.0, 7001.0, 7000.0))

        def forward(self, x):
            return x * 0 + (self.small + self.large - self.other)

    def detour(gm, context):
        for node in gm.graph.find_nodes(op="call_function", target=operator.sub):
            with gm.graph.inserting_before(node):
                scaled = gm.graph.call_function(torch.mul, (node.args[0], 0.7))
                node.update_arg(0, gm.graph.call_function(torch.div, (scaled, 0.7)))

    kbit.register_pass(detour, tier="bounded", before="pack")
    x, call = torch.randn(24), torch.compile(Cancelling(), backend="kbit", options=OPTIONS | {"debug": True})
    assert torch.allclose(call(x), torch.arange(2.0, 26.0), atol=8000 * 2 * torch.finfo(torch.float32).eps)
