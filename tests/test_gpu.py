"""On a GPU: every kernel against the reference, fused graphs, CUDA graphs on weights that change. ``make gpu`` runs these first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

import test_triton_kernels as kernels
from test_gpu_fusion import FUSED, Gated

from kbit_inductor import WrongDeviceError, explain
from kbit_inductor.testing import dequantized_copy, relative_error, rewrite
from kbit_inductor.weights.store import STORE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.usefixtures("without_grad"),
]
CHECKS = sorted(name for name in vars(kernels) if name.startswith("check_") and name != "check_a_graph_of_fused_products")
# Of a result of a few sums of this dtype, in units of its rounding: products, activation, factor and residual each round once.
ERRORS = {torch.float16: 4 * 2**-11, torch.bfloat16: 4 * 2**-8, torch.float32: 2**-18}


@pytest.fixture
def without_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_match_the_reference_on_the_device(check: str) -> None:
    """What test_triton_kernels.py interprets, with all tensors on the GPU."""
    if "gib" in check and torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("the GPU has less memory than this takes")
    with torch.device("cuda"):
        getattr(kernels, check)()


def gated(dtype: torch.dtype = torch.float16) -> tuple[nn.Module, Tensor]:
    with torch.device("cuda"):
        model = Wide().to(dtype).eval().requires_grad_(False)
        return model, torch.randn(3, 512, dtype=dtype)


class Wide(Gated):
    """As wide as a small model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(512, 1024), nn.Linear(512, 1024), nn.Linear(1024, 512)


def assert_right(compiled: Any, model: nn.Module, x: Tensor) -> None:
    actual = compiled(x).clone()  # a recording writes its result where it wrote the last one
    expected = dequantized_copy(model).float()(x.float())
    assert relative_error(actual, expected) < ERRORS[x.dtype]


@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_compiled_layer_is_fused_and_right(bits: int, dtype: torch.dtype) -> None:
    model, x = gated(dtype)
    options = {"bits": bits, "group_size": 128}
    (graph,) = rewrite(model, x, config=options)
    assert graph.operators == {FUSED: 2}
    compiled = torch.compile(model, backend="kbit", options=options, dynamic=True)
    for rows in (x, x[:1], x.repeat(20, 1), x.repeat(100, 1)):
        assert_right(compiled, model, rows)


def recorded(model: nn.Module) -> Any:
    return torch.compile(model, backend="kbit", options={"bits": 4, "mode": "reduce-overhead"})


def test_cuda_graphs_read_weights_that_change() -> None:
    model, x = gated()
    compiled = recorded(model)
    for _ in range(4):  # warmed up, recorded, replayed
        assert_right(compiled, model, x)
    ((_, packed),) = STORE.packed_forms(model.up.weight)
    address = packed.operands[0].data_ptr()
    for _ in range(3):
        model.up.weight.mul_(-1)
        model.down.weight.data = torch.randn_like(model.down.weight) / 32
        assert_right(compiled, model, x)
        ((_, packed),) = STORE.packed_forms(model.up.weight)
        assert packed.operands[0].data_ptr() == address
    for _ in range(3):  # another parameter, and whatever else takes the memory of the old one's
        model.gate.weight = nn.Parameter(torch.randn_like(model.gate.weight) / 22, requires_grad=False)
        filler = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
        assert_right(compiled, model, x)
        del filler


def test_layers_that_share_a_graph_have_recordings_of_their_own() -> None:
    layers, x = [gated()[0] for _ in range(3)], gated()[1]
    for layer in layers:
        layer.compile(backend="kbit", options={"bits": 4, "mode": "reduce-overhead"})
    expected = x.float()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()  # a step is all layers: the result of one is the next one's input
        actual = x
        for layer in layers:
            actual = layer(actual)
        actual = actual.clone()
    for layer in layers:
        expected = dequantized_copy(layer).float().forward(expected)
    assert relative_error(actual, expected) < len(layers) * ERRORS[torch.float16]


def test_an_input_on_the_cpu_is_an_error_and_not_a_crash() -> None:
    from kbit_inductor import quantize_

    model, x = gated()
    quantize_(model, {"bits": 4})
    with pytest.raises(WrongDeviceError, match="the input is on cpu"):
        model(x.cpu())
    assert torch.isfinite(model(x)).all()


def test_explain_names_the_kernel() -> None:
    model, x = gated()
    kernels_used = {kernel for layer in explain(model, x, config={"bits": 4}).layers for kernel in layer.kernels}
    assert kernels_used and "reference" not in kernels_used


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_layers_on_two_gpus() -> None:
    first, second = gated()[0], gated()[0].to("cuda:1")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).to("cuda:1"))

    model, x = Both().eval(), gated()[1]
    actual = torch.compile(model, backend="kbit", options={"bits": 4})(x)
    expected = dequantized_copy(model).float()(x.float())
    assert relative_error(actual, expected) < 2 * ERRORS[torch.float16]
