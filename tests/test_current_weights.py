"""A compiled call uses the weights that the model has now: no weight is folded into a graph, and none is packed for good.

The oracle is the model in eager with its weights dequantized. That alone would not see a stale pack, whose dequantized form is
stale too, so most tests compile to 8 bits and also ask that the result be near the float model as it is now.
"""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from kbit_inductor.packing import PackedWeight
from kbit_inductor.store import STORE
from kbit_inductor.testing import dequantized_copy, relative_error

WIDTH = 64
HIDDEN = 128
EIGHT = {"bits": 8}

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, WIDTH)


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    return torch.compile(model, backend="kbit", options=EIGHT)


def rounding(products: int, dtype: torch.dtype = torch.float32) -> float:
    """A bound on the relative difference of two evaluations of a chain of ``products`` dot products of HIDDEN terms at most.

    A float32 dot product of K terms is off by at most K·u·Σ|xᵢwᵢ|, u = 2⁻²⁴ (Higham, 2002, section 3.1), and for terms of random
    sign Σ|xᵢwᵢ| is √K times the sum itself; both evaluations are off that much, hence factor 2. In a narrower dtype input,
    weight and result of each product are rounded once more in each evaluation, by half of its eps relative to Σ|xᵢwᵢ|.
    """
    narrow = 0.0 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps / 2
    return 2 * products * HIDDEN**0.5 * (HIDDEN * 2.0**-24 + narrow)


def quantized(products: int) -> float:
    """A bound on what 8 bits change: weights of Linear's uniform initialization on (−a, a) are rounded by a/255, and a/√3 is
    their root mean square, so 0.7 % per product; embeddings are normal, and a group of 64 of those spans 2.5 times as much.
    """
    return 0.02 * products


def assert_current(y: Tensor, model: nn.Module, *args: Tensor, products: int = 2) -> None:
    """``y`` is what ``model`` gives now, with packed weights."""
    assert relative_error(y, dequantized_copy(model)(*args)) <= rounding(products)
    floats = model(*args)
    assert 0 < relative_error(y, floats) <= quantized(products)


def assert_changed(y: Tensor, old: Tensor) -> None:
    """The weights were changed by so much that a stale result could not be taken for the new one."""
    assert relative_error(y, old) > 0.1


def packed(weight: Tensor) -> PackedWeight:
    """The one packed form of ``weight``."""
    ((_, form),) = STORE.packed_forms(weight)
    return form


# ---------------------------------------------------------------- one graph, many weights


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


# ---------------------------------------------------------------- weights that change between calls


def multiply(model: Block) -> None:
    model.down.weight.mul_(-3)


def load(model: Block) -> None:
    model.load_state_dict(Block().state_dict())


def load_by_assignment(model: Block) -> None:
    model.load_state_dict(Block().state_dict(), assign=True)


def replace_parameter(model: Block) -> None:
    model.down.weight = nn.Parameter(torch.randn(WIDTH, HIDDEN))


def replace_frozen_parameter(model: Block) -> None:
    model.down.weight = nn.Parameter(torch.randn(WIDTH, HIDDEN), requires_grad=False)


def replace_module(model: Block) -> None:
    model.down = nn.Linear(HIDDEN, WIDTH)


def set_data(model: Block) -> None:
    model.down.weight.data = torch.randn(WIDTH, HIDDEN)


def copy_rows(model: Block) -> None:
    model.down.weight[::2].copy_(torch.randn(WIDTH // 2, HIDDEN))


def reset(model: Block) -> None:
    nn.init.normal_(model.up.weight)


CHANGES = [
    multiply,
    load,
    load_by_assignment,
    replace_parameter,
    replace_frozen_parameter,
    replace_module,
    set_data,
    copy_rows,
    reset,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_is_seen_by_the_next_call(change: Callable[[Block], None]) -> None:
    model = Block()
    call = compiled(model)
    x = inputs()
    old = call(x)
    assert_current(old, model, x)
    for _ in range(2):
        change(model)
        y = call(x)
        assert_current(y, model, x)
        assert_changed(y, old)
        old = y


def test_optimizer_steps_are_seen() -> None:
    model = Block()
    call = compiled(model)
    x = inputs()
    old = call(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    y = call(x)
    assert_current(y, model, x)
    assert_changed(y, old)


def test_data_set_again_and_again_is_seen_even_where_memory_is_used_again() -> None:
    model = Block()
    call = compiled(model)
    x = inputs()
    addresses = set()
    old = call(x)
    for _ in range(6):
        model.down.weight.data = torch.empty(0)  # frees the memory, so that the next tensor of this size may get it
        model.down.weight.data = torch.randn(WIDTH, HIDDEN)
        addresses.add(model.down.weight.data_ptr())
        y = call(x)
        assert_current(y, model, x)
        assert_changed(y, old)
        old = y
    assert len(addresses) < 6  # else this tests nothing


def test_data_set_to_another_part_of_one_storage_is_seen() -> None:
    model = Block()
    call = compiled(model)
    x = inputs()
    bank = torch.randn(2, WIDTH, HIDDEN)
    model.down.weight.data = bank[0]
    old = call(x)
    assert_current(old, model, x)
    model.down.weight.data = bank[1]
    y = call(x)
    assert_current(y, model, x)
    assert_changed(y, old)


def test_data_set_to_its_own_transpose_is_seen() -> None:
    model = Square()
    call = compiled(model)
    x = inputs()
    old = call(x)
    model.proj.weight.data = model.proj.weight.data.t()
    y = call(x)
    assert_current(y, model, x)
    assert_changed(y, old)


def test_a_change_of_bias_needs_no_packing() -> None:
    model = Block()
    call = compiled(model)
    x = inputs()
    old = call(x)
    before = packed(model.down.weight)
    for change in (lambda: model.down.bias.add_(5), lambda: setattr(model.down, "bias", nn.Parameter(torch.randn(WIDTH)))):
        change()
        y = call(x)
        assert_current(y, model, x)
        assert_changed(y, old)
        old = y
    assert packed(model.down.weight) is before


def test_an_unchanged_weight_is_packed_once() -> None:
    model = Block()
    call = compiled(model)
    call(inputs())
    up, down = packed(model.up.weight), packed(model.down.weight)
    model.down.weight.mul_(2)
    call(inputs())
    assert packed(model.up.weight) is up
    assert packed(model.down.weight) is not down


def test_a_weight_that_changes_at_every_call_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Block()
    call = compiled(model)
    with caplog.at_level(logging.WARNING, logger="kbit_inductor.pack"):
        for _ in range(6):
            model.down.weight.mul_(1.5)
            call(inputs())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "down" in told[0] and "skip" in told[0]


def test_bfloat16_in_between_and_back() -> None:
    model = Block()
    call = compiled(model)
    x = inputs()
    first = call(x)
    assert_current(first, model, x)

    model.to(torch.bfloat16)
    y = call(x.bfloat16())
    assert y.dtype == torch.bfloat16
    twin = dequantized_copy(model)
    assert relative_error(y, twin(x.bfloat16())) <= rounding(products=2, dtype=torch.bfloat16)
    assert relative_error(y, first) <= quantized(products=2) + rounding(products=2, dtype=torch.bfloat16)

    model.to(torch.float32).down.weight.mul_(-3)
    back = call(x)
    assert back.dtype == torch.float32
    assert_current(back, model, x)
    assert_changed(back, first)


# ---------------------------------------------------------------- weights that are shared


class Square(nn.Module):
    """One module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.proj(x)))


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


# ---------------------------------------------------------------- threads and processes


def in_threads(calls: list[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """The results of ``calls``, all begun at the same moment, three times each."""
    ready = threading.Barrier(len(calls))

    def run(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():  # a thread begins with grad enabled
            ready.wait(timeout=60)
            first, *rest = [call(x) for _ in range(3)]
            assert all(torch.equal(first, other) for other in rest)
            return first

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_eight_threads_call_one_model() -> None:
    model = Block()
    call = compiled(model)
    x = inputs()
    old = call(x)
    multiply(model)  # all threads find the packed weight out of date
    results = in_threads([call] * 8, x)
    for y in results:
        assert_current(y, model, x)
        assert_changed(y, old)


def test_eight_threads_call_models_of_their_own() -> None:
    models = [Block() for _ in range(8)]
    x = inputs()
    compiled(Block())(x)  # the graph; torch itself cannot compile in several threads at once
    results = in_threads([compiled(model) for model in models], x)
    for model, y in zip(models, results, strict=True):
        assert_current(y, model, x)


def test_a_child_process_made_by_fork_uses_its_own_weights() -> None:
    torch.set_num_threads(2)
    model = Block()
    call = compiled(model)
    x = inputs()
    old = call(x)

    def child() -> None:
        # Eager products hang in a forked child, too, once OpenMP has started threads in the parent: libgomp's pool does not
        # survive a fork. One thread needs no pool.
        torch.set_num_threads(1)
        assert torch.equal(model(x), floats)
        assert relative_error(call(x), old) <= rounding(products=2)
        multiply(model)
        y = call(x)
        assert_current(y, model, x)
        assert_changed(y, old)

    floats = model(x)
    with STORE._lock:  # as another thread of the parent may hold it while it packs
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
    process.join(timeout=60)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert not alive and process.exitcode == 0
    assert_current(call(x), model, x)  # the parent's weights are as they were


# ---------------------------------------------------------------- recompiles


def test_a_reset_of_dynamo_keeps_packed_weights() -> None:
    model = Block()
    x = inputs()
    old = compiled(model)(x)
    up, down = packed(model.up.weight), packed(model.down.weight)
    torch._dynamo.reset()
    assert torch.equal(compiled(model)(x), old)
    assert packed(model.up.weight) is up and packed(model.down.weight) is down


def test_other_batches_and_shapes_use_the_packed_weights_that_exist() -> None:
    model = Block()
    call = compiled(model)
    call(inputs())
    forms = packed(model.up.weight), packed(model.down.weight)
    for shape in [(7, WIDTH), (1, WIDTH), (9, WIDTH), (2, 3, WIDTH), (2, 1, 3, WIDTH), (WIDTH,)]:
        x = torch.randn(shape)
        y = call(x)
        assert y.shape == shape
        assert_current(y, model, x)
    assert forms == (packed(model.up.weight), packed(model.down.weight))


@pytest.mark.parametrize("shape", [(0, WIDTH), (2, 0, WIDTH)])
def test_no_rows_give_no_rows(shape: tuple[int, ...]) -> None:
    model = Block()
    call = compiled(model)
    x = torch.randn(shape)
    y = call(x)
    assert y.shape == shape and y.dtype == x.dtype
    full = inputs()
    assert_current(call(full), model, full)


def transposed(rows: int) -> Tensor:
    return torch.randn(WIDTH, rows).t()


def every_second(rows: int) -> Tensor:
    return torch.randn(2 * rows, 2 * WIDTH)[1::2, ::2]


def same_row(rows: int) -> Tensor:
    return torch.randn(1, WIDTH).expand(rows, WIDTH)


def same_number(rows: int) -> Tensor:
    return torch.randn(rows, 1).expand(rows, WIDTH)


def same_batch(rows: int) -> Tensor:
    return torch.randn(1, rows, WIDTH).expand(3, rows, WIDTH)


@pytest.mark.parametrize("layout", [transposed, every_second, same_row, same_number, same_batch])
def test_strided_and_broadcast_inputs(layout: Callable[[int], Tensor]) -> None:
    model = Block()
    call = compiled(model)
    call(inputs(5))
    x = layout(5)
    assert_current(call(x), model, x)


# ---------------------------------------------------------------- garbage


def alive(planes: list[weakref.ref[Tensor]]) -> int:
    gc.collect()
    return sum(plane() is not None for plane in planes)


def test_packed_weights_go_with_the_model_while_its_compiled_function_lives() -> None:
    gc.collect()
    before = STORE.nbytes()
    x = inputs()
    call = torch.compile(lambda model, x: model(x), backend="kbit")
    model = Block()
    call(model, x)
    planes = [weakref.ref(packed(layer.weight).operands[0]) for layer in (model.up, model.down)]
    assert alive(planes) == 2 and STORE.nbytes() > before
    del model
    assert alive(planes) == 0 and STORE.nbytes() == before
    other = Block()
    y = call(other, x)
    assert relative_error(y, dequantized_copy(other)(x)) <= rounding(products=2)


def test_packed_weights_go_with_the_compiled_module_without_a_reset() -> None:
    gc.collect()
    before = STORE.nbytes()
    model = Block()
    call = compiled(model)
    call(inputs())
    call(inputs(1))
    planes = [weakref.ref(packed(layer.weight).operands[0]) for layer in (model.up, model.down)]
    del model, call
    assert alive(planes) == 0 and STORE.nbytes() == before


def test_packed_weights_of_a_replaced_parameter_go() -> None:
    model = Block()
    call = compiled(model)
    call(inputs())
    planes = [weakref.ref(packed(model.down.weight).operands[0])]
    size = STORE.nbytes()
    replace_parameter(model)
    assert alive(planes) == 0
    call(inputs())
    assert STORE.nbytes() == size


def test_out_of_date_packed_weights_go() -> None:
    model = Block()
    call = compiled(model)
    call(inputs())
    planes = [weakref.ref(packed(model.down.weight).operands[0])]
    size = STORE.nbytes()
    multiply(model)
    call(inputs())
    assert alive(planes) == 0
    assert STORE.nbytes() == size


# ---------------------------------------------------------------- gradients


class Normed(nn.Module):
    """Matched products between parameters that are not matched."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.block = Block()
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.block(self.norm(x))


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The result, and the gradients of its square sum at the input and at every parameter."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = call(x)
        y.square().sum().backward()
    found = {"x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}
    model.zero_grad(set_to_none=True)
    return y.detach(), found


def test_gradients_reach_everything_but_packed_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = Normed()
    x = inputs()
    with caplog.at_level(logging.WARNING, logger="kbit_inductor.capture"):
        y, actual = gradients(model, compiled(model), x)
    twin = dequantized_copy(model)
    expected_y, expected = gradients(twin, twin, x)
    assert relative_error(y, expected_y) <= rounding(products=2)
    frozen = {"block.up.weight", "block.down.weight"}
    assert {name for name, gradient in actual.items() if gradient is None} == frozen
    # Two products forward and two backward lie between any two of these. Sums over LayerNorm's WIDTH columns and over the rows
    # are shorter than a product of HIDDEN terms; there are three of them.
    for name in expected.keys() - frozen:
        assert relative_error(actual[name], expected[name]) <= rounding(products=7), name
    told = [record.getMessage() for record in caplog.records if "frozen" in record.getMessage()]
    assert len(told) == 1 and "block" in told[0] and "2 layers" in told[0]


def test_the_warning_of_frozen_weights_is_not_repeated_by_a_recompile(caplog: pytest.LogCaptureFixture) -> None:
    model = Normed()
    call = compiled(model)
    with caplog.at_level(logging.WARNING, logger="kbit_inductor.capture"):
        gradients(model, call, inputs())
        gradients(model, call, inputs(7))
    assert len([record for record in caplog.records if "frozen" in record.getMessage()]) == 1


def test_weights_that_require_no_grad_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Normed()
    for layer in (model.block.up, model.block.down):
        layer.weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING, logger="kbit_inductor.capture"):
        _, actual = gradients(model, compiled(model), inputs())
    assert actual["norm.weight"] is not None
    assert not caplog.records


def test_gradients_are_of_the_weights_at_the_time_of_the_forward_pass() -> None:
    model = Normed()
    call = compiled(model)
    x = inputs()
    _, old = gradients(model, call, x)
    multiply(model.block)
    _, actual = gradients(model, call, x)
    twin = dequantized_copy(model)
    _, expected = gradients(twin, twin, x)
    assert relative_error(actual["x"], expected["x"]) <= rounding(products=7)
    assert_changed(actual["x"], old["x"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_forward_pass_in_every_grad_mode(mode: Callable[[], torch.autograd.grad_mode.no_grad]) -> None:
    model = Block()
    call = compiled(model)
    x = inputs()
    old = call(x)
    with mode():
        y = call(x)
    assert y.requires_grad == (mode is torch.enable_grad)
    assert relative_error(y.detach(), old) <= rounding(products=2)
    multiply(model)
    with mode():
        y = call(x)
    with torch.no_grad():
        assert_current(y.detach(), model, x)
        assert_changed(y.detach(), old)


def test_a_double_backward_is_right_or_refused() -> None:
    model = Block()

    def penalty(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            x = start.clone().requires_grad_()
            (slope,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
            slope.square().sum().backward()
        return x.grad

    start = inputs()
    try:
        actual = penalty(compiled(model))
    except RuntimeError as error:
        assert "double backward" in str(error)
    else:
        assert relative_error(actual, penalty(dequantized_copy(model))) <= rounding(products=7)
