"""What is captured again, for other shapes or after a reset, finds the weights that are packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from current_weights import WIDTH, Block, assert_current, compiled, inputs, packed
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


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


def test_a_function_without_weights_is_compiled() -> None:
    x = torch.randn(3, 5)
    assert torch.equal(torch.compile(lambda x: x * 2 + 1, backend="kbit")(x), x * 2 + 1)
