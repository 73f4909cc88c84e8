"""Threads and child processes use the weights of the model that they call."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from current_weights import Block, assert_changed, assert_current, compiled, inputs, multiply, rounding
from torch import Tensor

from kbit_inductor.testing import relative_error
from kbit_inductor.weights.store import STORE

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


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
