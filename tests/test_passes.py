"""Passes of others: where they stand, what they may do, and that the caches of torch know them."""

from __future__ import annotations

import contextlib
from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kbit_inductor as kbit
from kbit_inductor import backend, entry_points, kernel_registry
from kbit_inductor.digest import digest
from kbit_inductor.lowering.registry import Kernel
from kbit_inductor.passes import pipeline, registry
from kbit_inductor.passes.order import ordered
from kbit_inductor.passes.registry import make_pass
from kbit_inductor.quantizers import Quantizer, rtn


def nothing(gm, context):
    pass


def test_the_built_in_passes_are_in_the_order_in_which_they_are_written():
    assert registry.passes() == pipeline.BUILT_IN


@given(order=st.permutations(range(10)))
def test_the_order_depends_on_constraints_and_names_alone(order):
    extra = [
        make_pass(nothing, name="zeta", tier="bitwise", before="pack"),
        make_pass(nothing, name="alpha", tier="bitwise", after="expand", before=("zeta",)),
        make_pass(nothing, name="late", tier="bounded", after="cleanup"),
    ]
    every = [*pipeline.BUILT_IN, *extra]
    names = [each.name for each in ordered([every[i] for i in order])]
    assert names == ["select", "fold", "expand", "alpha", "zeta", "pack", "fuse", "chain", "cleanup", "late"]


def test_a_circle_is_an_error_that_names_it():
    one = make_pass(nothing, name="one", tier="bitwise", after="pack", before="two")
    two = make_pass(nothing, name="two", tier="bitwise", before="expand")
    with pytest.raises(kbit.PassOrderError, match=r"circle: (?=.*one)(?=.*two)(?=.*expand)(?=.*pack).* before .*take away"):
        ordered([*pipeline.BUILT_IN, one, two])


def test_mistakes_of_a_pass_are_errors(unregister):
    with pytest.raises(kbit.InvalidPassError, match=r"tier 'exact'.*bitwise"):
        kbit.register_pass(nothing, tier="exact")
    with pytest.raises(kbit.PassOrderError, match=r"'packs'.*Did you mean 'pack'"):
        ordered([*pipeline.BUILT_IN, make_pass(nothing, tier="bitwise", before="packs")])
    kbit.register_pass(nothing, tier="bitwise")
    kbit.register_pass(nothing, tier="bitwise")  # the same again
    with pytest.raises(kbit.InvalidPassError, match="another pass of the name 'nothing'"):
        kbit.register_pass(nothing, tier="bounded")
    with pytest.raises(kbit.InvalidPassError, match="another pass of the name 'pack'"):
        kbit.register_pass(nothing, tier="bounded", name="pack")


def test_a_pass_that_returns_another_graph_is_told_to_edit_its_own(unregister):
    kbit.register_pass(lambda gm, context: torch.fx.GraphModule(gm, torch.fx.Graph()), name="other", tier="bitwise")
    with torch.no_grad(), pytest.raises(kbit.InvalidPassError, match="'other' returned another graph; edit gm"):
        torch.compile(nn.Linear(64, 64), backend="kbit")(torch.randn(2, 64))


class Tanh(nn.Module):
    """A tanh written by hand, around products or none."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        y = self.layers(x)
        return 2 * torch.sigmoid(2 * y) - 1


def tanh_by_hand(x):
    return 2 * torch.sigmoid(2 * x) - 1


def replace_tanh(gm, context):
    """Known to anyone who knows FX: pattern and replacement side by side."""
    torch.fx.subgraph_rewriter.replace_pattern(gm, tanh_by_hand, lambda x: torch.tanh(x))


@pytest.mark.usefixtures("unregister", "one_thread_without_grad")
@pytest.mark.parametrize("layers", [(), (nn.Linear(64, 64),)], ids=["no product", "a product"])
def test_what_a_pass_writes_is_seen_by_the_passes_after_it(layers, monkeypatch):
    kept = []
    monkeypatch.setattr(backend, "inductor", lambda gm, inputs, mode: kept.append(gm) or gm.forward)
    kbit.register_pass(replace_tanh, tier="bounded", before="fold")
    x = torch.randn(3, 64)
    y = torch.compile(Tanh(*layers), backend="kbit", options={"bits": 8})(x)
    assert y.shape == (3, 64)
    calls = [node.target for node in kept[0].graph.nodes if node.op == "call_function"]
    # With a product the built-in fusion took the tanh, which it only does for a node whose value it knows.
    assert calls == ([torch.ops.kbit.fused_linear_cpu.default] if layers else [torch.tanh])


class Package:
    """An installed package with entry points, without one being installed."""

    def __init__(self, monkeypatch, **objects):
        self.points = [EntryPoint(name, f"package:{name}", "") for name in objects]
        monkeypatch.setattr(EntryPoint, "load", lambda point: objects[point.name])
        monkeypatch.setattr(entry_points, "entry_points", lambda group: self.points)
        entry_points.load.cache_clear()


def test_entry_points_add_passes_kernels_and_quantizers(unregister, monkeypatch):
    Package(monkeypatch, sweep=make_pass(nothing, name="sweep", tier="bitwise", after="cleanup"))
    assert registry.passes()[-1].name == "sweep"
    kernel = Kernel("mine", "_triton", lambda problem: "not today", lambda problem: 0.0)
    Package(monkeypatch, mine=kernel)
    assert kernel_registry.kernels()[-1] is kernel
    Package(monkeypatch, mine=Quantizer("mine", rtn))
    assert kbit.LayerConfig(quantizer="mine").quantizer == "mine"


def test_an_entry_point_of_the_wrong_kind_is_named(unregister, monkeypatch):
    Package(monkeypatch, wrong=3)
    with pytest.raises(kbit.InvalidPassError, match=r"'wrong'.*package:wrong.*names a int"):
        registry.passes()
    with pytest.raises(kbit.InvalidKernelError, match=r"'wrong'.*names a int"):
        kernel_registry.kernels()
    with pytest.raises(kbit.InvalidOptionError, match=r"'wrong'.*names a int"):
        kbit.LayerConfig(quantizer="nobody")


def test_a_registered_kernel_is_chosen_where_it_is_the_cheapest(unregister, monkeypatch):
    supports = lambda problem: None if problem.rows == 48 else "takes 48 rows only"  # noqa: E731
    kbit.register_kernel("forty-eight", "", supports, lambda problem: 0.0)
    report = kbit.explain(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)), torch.randn(2, 64))
    assert [layer.kernels for layer in report.layers] == [("forty-eight",), ("cpu",)]
    assert report.layers[1].rejected["forty-eight"] == "takes 48 rows only"


def test_mistakes_of_a_kernel_are_errors(unregister):
    able, free = lambda problem: None, lambda problem: 0.0
    with pytest.raises(kbit.InvalidKernelError, match=r"no operator kbit::linear_nowhere.*define"):
        kbit.register_kernel("nowhere", "_nowhere", able, free)
    with pytest.raises(kbit.InvalidKernelError, match="another kernel of the name 'cpu'"):
        kbit.register_kernel("cpu", "", able, free)
    with pytest.raises(kbit.InvalidKernelError, match="layout 'rows'"):
        kbit.register_kernel("rows", "", able, free, layout="rows")


def test_the_digest_knows_names_places_and_sources():
    def make(number):
        return lambda gm, context: gm.graph.lint() if number else None

    one = digest([make_pass(nothing, tier="bitwise")])
    assert one == digest([make_pass(nothing, tier="bitwise")])
    others = [make_pass(nothing, tier="bounded"), make_pass(nothing, tier="bitwise", after="pack"),
              make_pass(make(1), name="nothing", tier="bitwise")]  # fmt: skip
    assert len({one, *(digest([other]) for other in others)}) == 4


@contextlib.contextmanager
def counted():
    counters = torch._dynamo.utils.counters["inductor"]
    before = counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"]
    found = {}
    yield found
    found["hits"], found["misses"] = (
        counters[f"fxgraph_cache_{what}"] - count for what, count in zip(("hit", "miss"), before, strict=True)
    )


def test_a_new_pass_is_part_of_the_keys_of_torchs_caches(unregister):
    def compile_anew():
        torch._dynamo.reset()
        with torch.no_grad(), counted() as found, torch._functorch.config.patch(enable_autograd_cache=False):
            torch.compile(nn.Linear(64, 32), backend="kbit")(torch.randn(2, 64))
        return found

    compile_anew()
    assert compile_anew() == {"hits": 1, "misses": 0}
    kbit.register_pass(nothing, tier="bitwise")  # the graph stays as it was
    assert compile_anew() == {"hits": 0, "misses": 1}
