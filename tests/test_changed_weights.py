"""Weights that change between calls are seen by the next one."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from current_weights import (
    HIDDEN,
    WIDTH,
    Block,
    Square,
    assert_changed,
    assert_current,
    compiled,
    inputs,
    multiply,
    packed,
    quantized,
    replace_parameter,
    rounding,
)
from torch import nn

from kbit_inductor.testing import dequantized_copy, relative_error

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


def load(model: Block) -> None:
    model.load_state_dict(Block().state_dict())


def load_by_assignment(model: Block) -> None:
    model.load_state_dict(Block().state_dict(), assign=True)


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
