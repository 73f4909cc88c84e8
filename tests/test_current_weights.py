"""A compiled call uses the weights that the model has: no weight is folded into a graph, and one that is shared is packed once."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from current_weights import (
    EIGHT,
    HIDDEN,
    WIDTH,
    Block,
    Square,
    Stack,
    assert_changed,
    assert_current,
    compiled,
    inputs,
    packed,
    quantized,
    rounding,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.weights.store import STORE

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


def test_layers_that_share_one_graph_each_use_their_own_weights() -> None:
    model = Stack(4)
    twin = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend="kbit", options=EIGHT)
    counters.clear()
    x = inputs()
    y = model(x)
    assert counters["stats"]["unique_graphs"] == 1
    assert relative_error(y, dequantized_copy(model)(x)) <= rounding(products=8)
    assert 0 < relative_error(y, twin(x)) <= quantized(products=8)
    forms = [packed(block.up.weight).operands[0] for block in model.blocks]
    assert not torch.equal(forms[0], forms[1])


def test_models_of_one_class_each_use_their_own_weights() -> None:
    models = [Block() for _ in range(3)]
    calls = [compiled(model) for model in models]
    x = inputs()
    for _ in range(2):
        for model, call in zip(models, calls, strict=True):
            assert_current(call(x), model, x)
    assert_changed(calls[0](x) - x, calls[1](x) - x)


def test_a_deepcopy_keeps_its_own_weights() -> None:
    original = Block()
    x = inputs()
    call = compiled(original)
    before = call(x)
    copied = copy.deepcopy(original)
    copied.down.weight.mul_(-3)
    y = compiled(copied)(x)
    assert_current(y, copied, x)
    assert_changed(y, before)
    assert torch.equal(call(x), before)


def test_a_deepcopy_of_the_compiled_module_keeps_its_own_weights() -> None:
    original = Block()
    x = inputs()
    call = compiled(original)
    before = call(x)
    copied = copy.deepcopy(call)
    copied._orig_mod.down.weight.mul_(-3)
    y = copied(x)
    assert_current(y, copied._orig_mod, x)
    assert_changed(y, before)
    assert torch.equal(call(x), before)


def test_the_uncompiled_module_pickles_after_a_compiled_call() -> None:
    model = Block()
    x = inputs()
    y = compiled(model)(x)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(x), model(x))
    again = compiled(loaded)(x)
    assert_current(again, loaded, x)
    assert relative_error(again, y) <= rounding(products=2)
    loaded.down.weight.mul_(-3)
    assert_changed(compiled(loaded)(x), y)


class Shared(nn.Module):
    """One weight in two layers, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Tied(nn.Module):
    """A language model's embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.embedding(tokens)))


@pytest.mark.parametrize("kind", [Square, Shared, Tied])
def test_a_weight_with_two_uses_is_packed_once_and_stays_current(kind: type[nn.Module]) -> None:
    model = kind()
    (weight,) = (parameter for parameter in model.parameters() if parameter.dim() == 2)
    x = torch.randint(HIDDEN, (4, 3)) if kind is Tied else inputs()
    call = compiled(model)
    gc.collect()  # models of earlier tests, which would go in between
    before = STORE.nbytes()
    old = call(x)
    assert_current(old, model, x)
    assert STORE.nbytes() - before == packed(weight).nbytes < weight.nbytes / 2
    weight.copy_(torch.randn_like(weight))
    y = call(x)
    assert_current(y, model, x)
    assert_changed(y, old)
    assert STORE.nbytes() - before == packed(weight).nbytes


def test_untying_is_seen() -> None:
    model = Tied()
    call = compiled(model)
    tokens = torch.randint(HIDDEN, (4, 3))
    old = call(tokens)
    model.head.weight = nn.Parameter(torch.randn(HIDDEN, WIDTH))
    y = call(tokens)
    assert_current(y, model, tokens)
    assert_changed(y, old)
