"""What no pass may ever do: fuse across a write, guard a size, move random numbers, hold on to what was traced or to a module."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from current_weights import Block, inputs
from fusions import OPTIONS, Compiled
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from kbit_inductor import backend
from kbit_inductor._compat import FakeTensor
from kbit_inductor.config import Config
from kbit_inductor.testing import dequantized_copy, models, relative_error, rewrite

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")
# Memory of x under another name. A view counts the versions of what it is of; a detached tensor counts its own.
OTHER_NAMES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(-1),
    "part": lambda x: x[1:],
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
}


class WrittenBetween(nn.Module):
    """Two products of x, whose memory is written to between them under another name."""

    def __init__(self, name: Callable[[Tensor], Tensor], is_input: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.name, self.is_input, self.start = name, is_input, torch.randn(3, 24)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        before = self.first(x)
        other = given if self.is_input else self.name(x)
        other.mul_(3)
        result = before + self.second(x)
        other.copy_(self.name(self.start))  # the next call begins with the same x
        return result


@pytest.mark.parametrize("is_input", [False, True])
@pytest.mark.parametrize("name", OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_a_write_under_another_name_keeps_products_apart(name: Callable[[Tensor], Tensor], is_input: bool) -> None:
    module = WrittenBetween(name, is_input)
    x = module.start.clone()
    found = Compiled(module, x, name(x))
    assert not found.fusions["siblings"] and found.error < 1e-5


class Sizes(nn.Module):
    """Products of rows in every family of fusions, of an x whose sizes are not known."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.conv, self.bag = models.Block(), nn.Conv1d(24, 16, 3, padding=1), nn.EmbeddingBag(30, 16)
        self.head, self.experts = nn.Linear(16, 30), nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        y = functional.relu(self.conv(self.block(x).transpose(1, 2))).transpose(1, 2)
        y = torch.einsum("btk,bkn->btn", y, self.experts[indices[:, 0] % 4])
        return self.head(y + self.bag(indices)[:, None])[:, -1]


def test_no_pass_guards_a_size() -> None:
    """What is known of sizes is what Dynamo knew: no guard, no range that is narrower, none that became a number."""

    def known(context: Any) -> tuple[Any, ...]:
        shapes = context.fake_mode().shape_env
        return len(shapes.guards), dict(shapes.replacements), dict(shapes.var_to_range)

    seen: list[str] = []

    class Watch:
        def before(self, gm: fx.GraphModule, context: Any) -> None:
            self.known = known(context)
            assert self.known[2]  # there are symbolic sizes

        def after(self, each: Any, gm: fx.GraphModule, context: Any, seconds: float) -> None:
            if known(context) != self.known:
                seen.append(each.name)

    (graph,) = rewrite(
        Sizes().eval(), torch.randn(5, 7, 24), torch.randint(0, 30, (5, 6)), config=OPTIONS, observers=[Watch()], dynamic=True
    )
    assert graph.fusions["siblings"] and graph.fusions["gate"] and len(graph.context.uses) > 8
    assert not seen


class Random(nn.Module):
    """Random numbers between all that may be fused or moved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gate, self.up = (nn.Linear(24, 24) for _ in range(4))
        self.down, self.head = nn.Linear(24, 24), nn.Linear(24, 30)
        self.norm = nn.RMSNorm(24, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        noise = torch.rand_like(x)
        y = functional.dropout(a + self.second(x) * noise, 0.5, True)
        torch.rand(3)  # read by nothing, and yet what follows depends on it
        normed = self.norm(y)
        gated = functional.silu(self.gate(normed)) * functional.dropout(self.up(normed), 0.2, True)
        y = y + self.down(gated + torch.randn_like(gated))
        return functional.dropout(self.head(self.norm(y)), 0.1, True)[:, -1] + torch.bernoulli(torch.full((30,), 0.5))


def test_random_numbers_are_drawn_in_their_order() -> None:
    model, x = Random().eval(), torch.randn(2, 3, 24)
    (graph,) = rewrite(model, x, config=OPTIONS)
    assert graph.fusions["siblings"] and graph.fusions["norm"]  # products did move
    kept = backend.kept_arguments(graph.context, len(graph.inputs))
    bound = backend.Bound(graph.graph.forward, kept, tuple(graph.context.slots))
    results = []
    for call in (lambda: bound(*graph.inputs)[0], lambda: dequantized_copy(model)(x)):
        torch.manual_seed(1)
        results.append((call(), torch.rand(4)))  # and as many were drawn
    (actual, after), (expected, after_expected) = results
    assert torch.equal(after, after_expected) and relative_error(actual, expected) < 1e-5


def reachable(start: Any) -> Iterator[Any]:
    """All objects that ``start`` keeps alive, but for what is there for good: modules, classes, a function's globals."""
    seen: dict[int, Any] = {}
    waiting = [start]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (types.ModuleType, type)):
            continue
        seen[id(each)] = each
        yield each
        is_function = isinstance(each, types.FunctionType)
        waiting += [each.__closure__, each.__defaults__, each.__kwdefaults__] if is_function else gc.get_referents(each)


def test_what_is_compiled_holds_nothing_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither fake tensors, which hold all of a capture, nor its graph, nor a model. What Inductor makes is left out."""
    model = nn.Sequential(models.Block(), weight_norm(nn.Linear(24, 40)))
    contexts: list[weakref.ref[Any]] = []
    bounds: list[Any] = []
    real = backend.capture

    def watched(*arguments: Any) -> Any:
        graph, context = real(*arguments)
        contexts.append(weakref.ref(context))
        return graph, context

    monkeypatch.setattr(backend, "capture", watched)
    monkeypatch.setattr(backend, "inductor", lambda *_: lambda *_: None)

    def keep(gm: fx.GraphModule, given: Any) -> Any:
        bounds.append(backend.compile_graph(gm, given, Config.from_options(OPTIONS)))
        return gm.forward

    torch.compile(model, backend=keep)(torch.randn(2, 3, 24))
    gc.collect()
    assert bounds and [context() for context in contexts] == [None] * len(bounds)
    held = [each for each in reachable(bounds) if isinstance(each, (FakeTensor, nn.Module))]
    assert len(held) == 1 and isinstance(held[0], fx.GraphModule)  # what computes the weight of weight_norm


def test_no_module_is_kept_alive() -> None:
    """Neither by the compiled function nor by another model that shares its code."""
    call, several = torch.compile(lambda model, x: model(x), backend="kbit"), [Block(), Block()]
    for model in several:
        call(model, inputs())
    parts = [[weakref.ref(part) for part in (*model.modules(), *model.parameters())] for model in several]
    del model
    while several:
        del several[-1]
        gc.collect()
        assert [part() is not None for part in parts.pop()] == [False] * 7
    assert call(Block(), inputs()).shape == inputs().shape
