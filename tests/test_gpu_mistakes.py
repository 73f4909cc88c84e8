"""What is wrong with a machine, devices or operands: a named error, or a slower path with its reason. No GPU is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor import LayerConfig
from kbit_inductor._compat import FakeTensorMode
from kbit_inductor.lowering import gpu, registry, requirements
from kbit_inductor.lowering.registry import Choice, Problem, choose
from kbit_inductor.models import modules
from kbit_inductor.packing import pack, plane_operands
from kbit_inductor.passes import lower
from kbit_inductor.testing import relative_error, rewrite
from kbit_inductor.testing.without_gpu import fake_gpu_model, operators_on_cpu

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("one_thread_without_grad")

(TRITON,) = (kernel for kernel in registry.KERNELS if kernel.name == "triton")
PROBLEM = Problem("linear", "cuda", torch.float16, 64, 256, 4, 64)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    questions = (requirements.triton_problem, requirements.gpu_problem)
    for question in questions:
        question.cache_clear()
    yield
    for question in questions:
        question.cache_clear()


def refused(problem: Problem = PROBLEM) -> str:
    """Why the reference takes the place of the Triton kernel."""
    choice = choose(problem)
    assert choice.kernel.name == "reference"
    return dict(choice.rejected)["triton"]


def test_a_good_machine_runs_the_kernels() -> None:
    assert choose(PROBLEM).kernel is TRITON


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in refused()


@pytest.mark.parametrize("version", ["3.4.0", "2.3", "3.5.1+git1234"])
def test_an_old_triton(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert refused().startswith(f"Triton is {version}, the kernels need 3.6 or later")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one and an old one, as torch tells of them."""
    capabilities, names = {0: (9, 0), 1: (7, 5)}, {0: "H200", 1: "T4"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)


def test_an_old_gpu_beside_a_new_one(two_gpus: None) -> None:
    assert choose(PROBLEM).kernel is TRITON
    old = Problem("linear", "cuda", torch.float16, 64, 256, 4, 64, device_index=1)
    assert refused(old) == "GPU 1, T4, has compute capability 7.5; the kernels need 8.0 or later"


class OnTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x)).to("cuda:1")))


def test_each_layer_has_the_kernel_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "gpu_problem", lambda index: "too old" if index == 1 else None)
    mode = FakeTensorMode()
    model = fake_gpu_model(OnTwo().eval(), mode)
    model.second = fake_gpu_model(OnTwo().second, mode, "cuda:1")
    with mode:
        (graph,) = rewrite(model, torch.empty(3, 64, device="cuda:0"), config={"bits": 4})
    kernels = {use.weight.name: (choice.kernel.name, dict(choice.rejected).get("triton")) for use, choice in graph.context.choices}
    assert kernels == {"first": ("triton", None), "second": ("reference", "too old")}
    assert graph.operators["kbit.fused_linear_triton.default"] == 1 and graph.operators["kbit.linear.default"] == 1
    devices = [operands[0].device.index for operands in graph.context.operands]
    assert devices == [0, 1]


def words(bits: int = 4, **options: object) -> tuple[Tensor | None, ...]:
    """``words, scale, offset, global_scale, codebook`` of a weight ``[12, 64]`` in groups of 32."""
    config = LayerConfig(bits=bits, group_size=32, quantizer="rtn", **options)
    return plane_operands(pack(torch.randn(12, 64), config, layout="words").operands, config)


def test_tensors_on_another_device_are_named() -> None:
    *packed, codebook = words()
    x = torch.zeros(2, 64, device="meta")
    with pytest.raises(kbit.WrongDeviceError, match="the input is on meta, but weight of the packed layer on cpu"):
        gpu._linear(x, *packed, None, 4, 32, codebook)
    here = torch.zeros(2, 64)
    with pytest.raises(kbit.WrongDeviceError, match="bias of the packed layer on meta"):
        gpu._linear(here, *packed, torch.zeros(12, device="meta"), 4, 32, codebook)
    with pytest.raises(kbit.WrongDeviceError, match="residual"):
        lists = ([] if each is None else [each] for each in (*packed, None, codebook))
        gpu._fused_linear(here, None, 0.0, *lists, 4, 32, "", False, None, x[:, :12], 16)
    with pytest.raises(kbit.WrongDeviceError, match="the input is on meta"):
        gpu._embedding(torch.zeros(2, dtype=torch.int64, device="meta"), *packed, 64, 4, 32, torch.float16, codebook)


def test_operands_of_other_options_are_refused() -> None:
    *packed, codebook = words(4)
    x = torch.zeros(2, 64)
    for wrong, named in (((3, 32), "words"), ((4, 64), "scale"), ((8, 32), "words")):
        with pytest.raises(kbit.OperandMismatchError, match=f"{named} is .* packed with other options"):
            gpu._linear(x, *packed, None, *wrong, codebook)
    with pytest.raises(kbit.OperandMismatchError, match="a weight of 128 columns"):
        gpu._linear(torch.zeros(2, 128), *packed, None, 4, 32, codebook)
    levels = words(4, codebook="normal")[-1]
    with pytest.raises(kbit.OperandMismatchError, match="codebook"):
        gpu._linear(x, *packed, None, 4, 32, levels[:8])
    rows_first = (packed[0], packed[1].t().contiguous().t(), *packed[2:])
    with pytest.raises(kbit.OperandMismatchError, match="scale is not contiguous"):
        gpu._linear(x, *rows_first, None, 4, 32, codebook)


@pytest.fixture
def cpu_in_its_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (lower, modules):
        monkeypatch.setattr(module, "choose", lambda *_: Choice(TRITON, ()))
    with operators_on_cpu():
        yield


def test_bits_that_change_between_calls(cpu_in_its_place: None) -> None:
    """One layer compiled twice: each has its own packed weight, whichever is called."""
    layer, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(3, 64)
    compiled = {k: torch.compile(layer, backend="kbit", options={"bits": k}) for k in (4, 3)}
    for k in (4, 3, 4, 3):
        weight = pack(layer[0].weight, LayerConfig(bits=k)).dequantize()
        torch.testing.assert_close(compiled[k](x), nn.functional.linear(x, weight, layer[0].bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codebook", ["uniform", "nf"])
def test_packed_modules_call_the_kernels_of_a_gpu(codebook: str, cpu_in_its_place: None) -> None:
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 32)).eval()
    kbit.quantize_(model, {"bits": 3, "group_size": 32, "min_elements": 0, "codebook": codebook})
    assert {module.weight.layout for module in model} == {"words"}
    ids = torch.arange(6)
    expected = nn.functional.linear(model[0].weight.dequantize()[ids], model[1].weight.dequantize(), model[1].bias)
    assert relative_error(model(ids), expected) < 1e-5
    (graph,) = rewrite(nn.Sequential(model, nn.ReLU()), ids)
    assert graph.operators == {"kbit.embedding_triton.default": 1, "kbit.fused_linear_triton.default": 1}
    state = model.state_dict()
    assert state["1.weight.planes"].shape == (3, 32, 8) and state["1.weight.scale"].shape == (32, 2)
    model.load_state_dict(state)
    assert relative_error(model(ids), expected) < 1e-5


def test_a_product_that_does_not_fit_is_cut_smaller_and_the_log_says_so_once(caplog):
    from triton.runtime.errors import OutOfResources

    from kbit_inductor.kernels.triton.config import Config
    from kbit_inductor.lowering.errors import OutOfSharedMemoryError
    from kbit_inductor.lowering.fitting import launch_fitting

    def launch(config):
        if config.num_stages * config.block_n * config.block_m > room:
            raise OutOfResources(config.num_stages, room, "shared memory")
        return torch.tensor([config.block_n, config.block_m])

    room, device = 2000, torch.device("cuda", 0)
    for _ in range(2):
        assert launch_fitting(launch, Config(64, 128, 2), device).tolist() == [32, 32]
    (record,) = caplog.records
    assert "shared memory" in record.message and "block_m=32, block_n=32" in record.message
    room = 0
    with pytest.raises(OutOfSharedMemoryError, match="skip the layer"):
        launch_fitting(launch, Config(64, 128, 2), device)
