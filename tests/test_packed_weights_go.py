"""Packed weights go when the weights that they are of go, and are not kept by what is compiled."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from current_weights import Block, compiled, inputs, multiply, packed, replace_parameter, rounding
from torch import Tensor

from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.weights.store import STORE

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


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
