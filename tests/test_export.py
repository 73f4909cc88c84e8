"""A packed model as a package of AOTInductor: run in this process, in one without this package, and in C++.

To compile a package takes twenty seconds, so tests that do are run where ``KBIT_TEST_EXPORT`` is set: by ``make test-export``.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from test_surgery import OPTIONS, Model, model
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import kbit_inductor as kbit
from kbit_inductor.debug.inspector import WORSE
from kbit_inductor.kernels.cpu import build
from kbit_inductor.lowering import cpu
from kbit_inductor.models import package as exporting
from kbit_inductor.models.surgery import packed_matrices
from kbit_inductor.testing import relative_error

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cpp"
CMAKE = shutil.which("cmake", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))) or "cmake"
SIZES = ((2, 5), (1, 1), (3, 17))
compiles = pytest.mark.skipif("KBIT_TEST_EXPORT" not in os.environ, reason="compiles a package or a program: make test-export")


@pytest.fixture(autouse=True)
def _quick(one_thread_without_grad: None) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    return kbit.quantize_(model(), OPTIONS)


def exact_twin(packed: nn.Module) -> nn.Module:
    """``packed`` in float64, on the values that its codes stand for."""
    return kbit.dequantize_(copy.deepcopy(packed)).double()


def check_as_exact(found: Tensor, packed: Tensor, exact: Tensor) -> None:
    """``found``, whose sums are in another order than those of ``packed``, is no further from ``exact`` than so often that."""
    assert relative_error(found, exact) <= WORSE * relative_error(packed, exact)


@pytest.fixture(scope="module")
def package(packed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kbit.export(packed, torch.randint(0, 100, (2, 6)), tmp_path_factory.mktemp("package") / "model.pt2")


def test_the_program_that_is_compiled(packed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.export.ExportedProgram] = []

    def compile_package(program: torch.export.ExportedProgram, path: Path, library: Path) -> None:
        seen.append(program)
        assert library.read_bytes() == build.build().read_bytes()
        path.write_bytes(b"new")

    monkeypatch.setattr(exporting, "compile_package", compile_package)
    (tmp_path / "model.pt2").write_bytes(b"old")
    assert kbit.export(packed, {"ids": torch.randint(0, 100, (2, 6))}, tmp_path / "model.pt2").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2"]
    (program,) = seen
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.kbit.tiled_linear_cpu.default)
    for size in SIZES[::2]:
        ids = torch.randint(0, 100, size)
        check_as_exact(program.module()(ids=ids), packed(ids), exact_twin(packed)(ids))
    length = {"ids": {1: torch.export.Dim.DYNAMIC}}
    kbit.export(packed, {"ids": torch.randint(0, 100, (2, 6))}, tmp_path / "model.pt2", dynamic=length)
    fixed = seen.pop().module()
    assert fixed(ids=ids[:2]).shape == (2, 17, 100)
    with pytest.raises(AssertionError, match="Guard failed"):
        fixed(ids=ids)
    held = [*program.state_dict.values(), *program.constants.values()]
    matrices = {tensor.data_ptr() for tensor in held if tensor.dtype == torch.uint8}
    assert matrices == {matrix.tiled.data_ptr() for matrix in packed_matrices(packed)}
    assert all(tensor.dtype == torch.uint8 or tensor.dim() == 1 for tensor in held)


def test_what_surrounds_products_is_fused_into_them() -> None:
    llama = kbit.quantize_(models.llama(), OPTIONS)
    ids = torch.randint(0, models.VOCABULARY, (2, 6))
    sizes = {"input_ids": dict.fromkeys(range(2), torch.export.Dim.DYNAMIC), "use_cache": None}
    program = torch.export.export(llama, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=sizes)
    layers = llama.config.num_hidden_layers  # between the last norm and the head transformers takes rows
    fused = {"siblings": 5 * layers, "gate": layers, "residual": 2 * layers, "norm": 2 * layers, "attention": layers}
    assert exporting.fuse_program(program) == fused
    ids = torch.randint(0, models.VOCABULARY, (1, 9))
    found = [each(input_ids=ids, use_cache=False).logits for each in (program.module(), llama, exact_twin(llama))]
    check_as_exact(*found)


@compiles
def test_a_package_computes_the_model_for_any_batch_and_length(packed: nn.Module, package: Path) -> None:
    loaded = torch._inductor.aoti_load_package(str(package))
    for size in SIZES:
        ids = torch.randint(0, 100, size)
        check_as_exact(loaded(ids), packed(ids), exact_twin(packed)(ids))


@compiles
def test_a_package_holds_each_packed_weight_once_and_no_floats_of_it(packed: nn.Module, package: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    for matrix in packed_matrices(packed):
        assert content.count(matrix.tiled.numpy().tobytes()) == 1  # that of the tied head too
        assert matrix.dequantize()[:2].numpy().tobytes() not in content
    assert [path.name for path in package.parent.iterdir()] == ["model.pt2"]


WITHOUT_US = """
import sys, torch
from torch._inductor import aoti_load_package
loaded = aoti_load_package(sys.argv[1])
torch.save([loaded(ids) for ids in torch.load(sys.argv[2])], sys.argv[3])
assert not any(name.startswith("kbit") for name in sys.modules)
for name in sys.argv[4:]:
    print(getattr(torch.ops.kbit, name).default._schema)
"""


@compiles
@pytest.mark.rounded_activations  # as the model that was packed before
def test_a_process_needs_the_package_alone(packed: nn.Module, package: Path, tmp_path: Path) -> None:
    texts = [torch.randint(0, 100, size) for size in SIZES]
    torch.save(texts, tmp_path / "texts")
    names = ("linear_cpu", "embedding_cpu")
    arguments = [package, tmp_path / "texts", tmp_path / "found", *names]
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, *map(str, arguments)], check=True, capture_output=True, text=True)
    for ids, found in zip(texts, torch.load(tmp_path / "found"), strict=True):
        assert relative_error(found, packed(ids)) < 1e-6
    assert done.stdout.split("\n")[:-1] == [f"kbit::{name}{cpu.SCHEMAS[name]}" for name in names]


SHARED = """
import sys, torch
from torch._inductor import aoti_load_package
for step in sys.argv[1].split():
    if step == "package":
        loaded = aoti_load_package(sys.argv[2])
        loaded(torch.ones(1, 3, dtype=torch.int64))
    elif step == "import":
        from kbit_inductor.lowering import registry
        assert registry.cpu_library_problem() is None
        weight = torch.ops.kbit.empty_tiled_cpu(64, 64, torch.ones(1), 4, 32, True)  # the library frees its memory
    elif step == "close":
        del loaded
torch.ops.kbit.linear_cpu(torch.ones(1, 64), weight, None, 64, 16)
files = {line.split()[5] for line in open("/proc/self/maps") if "/libkbit.so." in line or "/kbit_cpu-" in line}
assert len(files) == 1, files
"""


@compiles
@pytest.mark.parametrize("steps", ["package close import package", "import package package close"])
def test_packages_and_this_package_share_one_library(package: Path, steps: str) -> None:
    subprocess.run([sys.executable, "-c", SHARED, steps, package], check=True)


@compiles
def test_the_example_in_cpp_writes_the_models_tokens(packed: nn.Module, package: Path, tmp_path: Path) -> None:
    assert len((EXAMPLE / "generate.cpp").read_text().splitlines()) < 60
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run([CMAKE, "-S", EXAMPLE, "-B", tmp_path, prefix], check=True, capture_output=True)
    subprocess.run([CMAKE, "--build", tmp_path], check=True, capture_output=True)
    command = [tmp_path / "generate", package, "6", "3", "14", "15"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    ids = torch.tensor([[3, 14, 15]])
    for _ in range(6):
        ids = torch.cat([ids, packed(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    tokens, memory = done.stdout.splitlines()
    assert [int(token) for token in tokens.split()] == ids[0, 3:].tolist()
    assert memory.startswith("VmHWM:") and "RssAnon:" in memory


class Branching(Model):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) if ids.sum() > 0 else ids


def test_what_cannot_be_exported_is_told(packed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, path = torch.zeros(2, 5, dtype=torch.int64), tmp_path / "model.pt2"
    double = kbit.quantize_(model(), OPTIONS).double()
    branching = kbit.quantize_(Branching().eval(), OPTIONS)
    cases = [
        (packed, ids, tmp_path / "model.so", kbit.InvalidOptionError, r"the name \*\.pt2, not 'model.so'"),
        (packed, ids[:1], path, kbit.InvalidOptionError, r"sizes \(1, 5\) says too little"),
        (kbit.quantize_(model(), OPTIONS).train(), ids, path, kbit.TrainingModeError, "call model.eval"),
        (model(), ids, path, kbit.UnexportableModelError, "no packed weight"),
        (double, ids, path, kbit.UnexportableModelError, "layer 'table' has the kernel 'reference'.*not torch.float64"),
        (packed, {"nothing": ids}, path, kbit.ModelCallError, "its call failed.*nothing"),
        (branching, {"ids": ids}, path, kbit.UncapturableModelError, "does not take Branching"),
    ]
    for given, example, where, error, says in cases:
        with pytest.raises(error, match=says):
            kbit.export(given, example, where)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cpu"))
    with pytest.raises(kbit.UnexportableModelError, match=r"packed embeddings.*torch 2\.12"):
        kbit.export(packed, ids, path)
    assert not any(tmp_path.iterdir())
