"""Gradients reach everything but packed weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from current_weights import WIDTH, Block, assert_changed, assert_current, compiled, inputs, multiply, rounding
from torch import Tensor, nn
from torch.autograd import forward_ad

import kbit_inductor as kbit
from kbit_inductor.testing import dequantized_copy, relative_error

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


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


def along(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The derivative of ``model`` at x in the direction of x."""
    return lambda x: torch.func.jvp(model, (x,), (x,))[1]


def dual(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same without torch.func."""

    def tangent(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent
            assert found is not None
            return found.clone()

    return tangent


@pytest.mark.parametrize("take", [along, dual, torch.func.jacrev, torch.func.jacfwd, torch.vmap])
def test_packed_modules_have_derivatives_of_every_kind(take: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    model = kbit.quantize_(nn.Sequential(nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 3)), {"min_elements": 0})
    floats, x = kbit.dequantize_(copy.deepcopy(model)), torch.randn(2, 40)
    assert relative_error(take(model)(x), take(floats)(x)) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "kbit"])
def test_a_derivative_in_forward_mode_inside_a_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kbit_inductor.backend.inductor", lambda gm, inputs, mode: gm.forward)
    model = kbit.quantize_(nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 3)), {"min_elements": 0})
    floats, x = kbit.dequantize_(copy.deepcopy(model)), torch.randn(2, 40)
    assert relative_error(torch.compile(along(model), backend=backend)(x), along(floats)(x)) < 1e-6
