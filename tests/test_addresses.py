"""Packed weights under CUDA graphs, as far as a machine without a GPU can show it: addresses that stay, and what is read there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kbit_inductor import LayerConfig
from kbit_inductor.packing import pack
from kbit_inductor.passes import lower
from kbit_inductor.testing import dequantized_copy
from kbit_inductor.testing.without_gpu import operators_on_cpu
from kbit_inductor.weights import addresses
from kbit_inductor.weights.store import STORE

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


@pytest.fixture
def recording_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU in the place of a GPU, whose addresses are taken for recorded."""
    from kbit_inductor.lowering.registry import KERNELS, Choice

    (triton,) = (kernel for kernel in KERNELS if kernel.name == "triton")
    monkeypatch.setattr(lower, "choose", lambda *_: Choice(triton, ()))
    monkeypatch.setattr(addresses, "RECORDING", ("cpu", "cuda"))
    with operators_on_cpu():
        yield


def pointers(weight: nn.Parameter) -> list[int]:
    ((_, packed),) = STORE.packed_forms(weight)
    return [operand.data_ptr() for operand in packed.operands]


def compiled_layer() -> tuple[nn.Sequential, torch.nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU()).eval().requires_grad_(False)
    return model, torch.compile(model, backend="kbit", options={"bits": 3, "codebook": "nf"}), torch.randn(3, 64)


def in_place(layer: nn.Linear) -> None:
    layer.weight.mul_(-2)


def other_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.randn(32, 64)


def loaded(layer: nn.Linear) -> None:
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})


@pytest.mark.parametrize("change", [in_place, other_data, loaded])
def test_a_weight_that_changes_is_packed_where_it_was(change, recording_cpu: None) -> None:
    model, compiled, x = compiled_layer()
    compiled(x)
    before = pointers(model[0].weight)
    for _ in range(2):
        change(model[0])
        assert not STORE.packed_forms(model[0].weight)
        torch.testing.assert_close(compiled(x), dequantized_copy(model)(x), rtol=1e-5, atol=1e-5)
        assert pointers(model[0].weight) == before


def test_another_parameter_has_memory_of_its_own(recording_cpu: None) -> None:
    """The old one's may be a recording's: it must not be written to while the old parameter lives."""
    model, compiled, x = compiled_layer()
    compiled(x)
    old, before = model[0].weight, pointers(model[0].weight)
    model[0].weight = nn.Parameter(torch.randn(32, 64), requires_grad=False)
    torch.testing.assert_close(compiled(x), dequantized_copy(model)(x), rtol=1e-5, atol=1e-5)
    assert not set(before) & set(pointers(model[0].weight)) and pointers(old) == before


def test_what_does_not_fit_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (pack(torch.randn(8, 64), LayerConfig(bits=4), layout="words") for _ in range(2))
    assert addresses.into(old, new) is new and addresses.into(None, new) is new  # nothing is recorded on a CPU
    monkeypatch.setattr(addresses, "RECORDING", ("cpu",))
    for config in (LayerConfig(bits=3), LayerConfig(bits=4, symmetric=True)):
        other = pack(torch.randn(8, 64), config, layout="words")
        kept = [operand.clone() for operand in old.operands]
        assert addresses.into(old, other) is other
        assert all(map(torch.equal, kept, old.operands))
    reused = addresses.into(old, new)
    assert reused.operands is old.operands and torch.equal(reused.dequantize(), new.dequantize())


def test_memory_made_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "RECORDING", ("cpu",))
    with torch.inference_mode():
        old = pack(torch.randn(8, 64), LayerConfig(bits=4), layout="words")
    new = pack(torch.randn(8, 64), LayerConfig(bits=4), layout="words")
    assert torch.equal(addresses.into(old, new).dequantize(), new.dequantize())
    with torch.inference_mode():
        again = addresses.into(new, pack(torch.randn(8, 64), LayerConfig(bits=4), layout="words"))
    assert again.operands is new.operands


def test_stale_memory_is_counted_and_goes_with_its_parameter(recording_cpu: None) -> None:
    model, compiled, x = compiled_layer()
    compiled(x)
    size = STORE.nbytes()
    model[0].weight.mul_(2)
    compiled(x)
    assert STORE.nbytes() == size
    del model, compiled
    torch._dynamo.reset()
    assert STORE.nbytes() < size
