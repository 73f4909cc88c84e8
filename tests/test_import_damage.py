"""Damaged files of every format: an error of ours, or a model; never another exception, and never much memory.

``make fuzz-files N=10000`` runs so many files of each (benchmarks/reliability.py); how they ended goes to the file that
``KBIT_FUZZ_RESULTS`` names.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import Model, write
from test_gguf import write as write_gguf
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.quantizers import codebook
from kbit_inductor.weights.release import trim_heap

EXAMPLES = int(os.environ.get("KBIT_TEST_EXAMPLES", "30"))
ROWS, COLUMNS = 32, 64
ROOM = 256 << 20  # far above what a file of some kilobytes needs, far below what a size read from it may ask for
WORKING = 8 << 20  # bytes for the codes that are looked at at once, of a file of any size
LARGE = (0, 1, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


@contextlib.contextmanager
def little_memory(room: int) -> Iterator[None]:
    """No more than ``room`` bytes of addresses besides those in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` cut off, with other bytes, with large numbers in it, or with something left out or twice; mostly near its start."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        reach = draw(st.sampled_from([8, 64, 1024, len(data)]))
        at = draw(st.integers(0, max(0, min(reach, len(data)) - 1)))
        kind = draw(st.sampled_from(["flip", "byte", "digit", "number", "cut", "drop", "twice"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.sampled_from(list(b'09"-{}[],:e.\x00\xff')))
        elif kind == "digit":  # leaves JSON what it is, and sizes and offsets in it are others
            digits = [place for place, byte in enumerate(data[:1024]) if byte in b"0123456789"]
            for place in digits and draw(st.lists(st.sampled_from(digits), min_size=1, max_size=2)):
                data[place] = draw(st.sampled_from(b"0123456789"))
        elif kind == "number":
            width = draw(st.sampled_from([4, 8]))
            data[at : at + width] = (draw(st.sampled_from(LARGE)) & (1 << 8 * width) - 1).to_bytes(width, "little")
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "twice":
            data[at:at] = data[at : at + draw(st.integers(1, 16))]
    return bytes(data)


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).to(dtype)


def of_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**{f"fc.{name}": tensor for name, tensor in tensors.items()}, "fc.bias": torch.zeros(ROWS)}


def gptq(folder: Path) -> None:
    words = {"qweight": random((COLUMNS // 8, ROWS)), "qzeros": random((2, ROWS // 8)), "scales": torch.rand(2, ROWS).half()}
    order = {"g_idx": torch.arange(COLUMNS, dtype=torch.int32) // 32}
    write(folder, of_layer({**words, **order}), quant_method="gptq", bits=4, group_size=32)


def awq(folder: Path) -> None:
    words = {"qweight": random((COLUMNS, ROWS // 8)), "qzeros": random((2, ROWS // 8)), "scales": torch.rand(2, ROWS).half()}
    write(folder, of_layer(words), quant_method="awq", bits=4, group_size=32)


def compressed(folder: Path) -> None:
    words = {"weight_packed": random((ROWS, COLUMNS // 8)), "weight_zero_point": random((ROWS // 8, 2))}
    told = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
    tensors = of_layer({**words, "weight_scale": torch.rand(ROWS, 2)})
    write(folder, tensors, quant_method="compressed-tensors", format="pack-quantized", config_groups={"group_0": told})


def bitsandbytes(folder: Path) -> None:
    levels = (torch.tensor(codebook("nf", 4), dtype=torch.float32) - 128) / 127
    state = b'{"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.5}'
    tensors = {
        "weight": random((ROWS * COLUMNS // 2, 1), torch.uint8), "weight.absmax": random((ROWS,), torch.uint8),
        "weight.quant_map": levels, "weight.nested_absmax": torch.rand(1), "weight.nested_quant_map": torch.rand(256),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }  # fmt: skip
    write(folder, of_layer(tensors), quant_method="bitsandbytes")


def hqq(folder: Path) -> None:
    numbers = {name: torch.tensor(value, dtype=torch.int32) for name, value in (("nbits", 4), ("group_size", 64), ("axis", 1))}
    grids = {"scale": torch.rand(ROWS, 1), "zero": torch.rand(ROWS, 1)}
    write(folder, of_layer({"W_q": random((ROWS // 2, 64), torch.uint8), **numbers, **grids}), quant_method="hqq")


def ours(folder: Path) -> None:
    kbit.save(kbit.quantize_(Model(ROWS, COLUMNS), {"group_size": 32}), folder)


def gguf(folder: Path) -> None:
    folder.mkdir()
    write_gguf(folder / "model.gguf")


def onnx(folder: Path) -> None:
    package = pytest.importorskip("onnx", reason="reads files of ONNX")
    folder.mkdir()
    constants = {"fc.weight_Q4": random((ROWS, 2, 16), torch.uint8), "scales": torch.rand(ROWS * 2), "fc.bias": torch.zeros(ROWS)}
    told = {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": 32}
    node = package.helper.make_node("MatMulNBits", ["x", "fc.weight_Q4", "scales"], ["y"], domain="com.microsoft", **told)
    ends = [package.helper.make_tensor_value_info(name, 1, [None, size]) for name, size in (("x", COLUMNS), ("y", ROWS))]
    tensors = [package.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()]
    graph = package.helper.make_graph([node], "graph", ends[:1], ends[1:], tensors)
    package.save(package.helper.make_model(graph), folder / "model.onnx")


def model() -> Model:
    return Model(ROWS, COLUMNS)


def checkpoint(folder: Path) -> Any:
    return kbit.from_checkpoint(folder, model)


Reader = Callable[[Path], Any]
FORMATS: dict[str, tuple[Callable[[Path], None], Reader]] = {
    "gptq": (gptq, checkpoint), "awq": (awq, checkpoint), "compressed-tensors": (compressed, checkpoint),
    "bitsandbytes": (bitsandbytes, checkpoint), "hqq": (hqq, checkpoint), "kbit": (ours, lambda folder: kbit.load(folder, model)),
    "onnx": (onnx, lambda folder: kbit.from_onnx(folder / "model.onnx", model)),
    "gguf": (gguf, lambda folder: kbit.from_gguf(folder / "model.gguf")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, read = FORMATS[name]
    make(tmp_path / "model")
    read(tmp_path / "model")  # whole, it is read
    files = {file: file.read_bytes() for file in sorted((tmp_path / "model").iterdir())}
    examples = EXAMPLES if name != "gguf" or "KBIT_TEST_EXAMPLES" in os.environ else EXAMPLES // 6  # transformers takes its time

    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(st.sampled_from(list(files)).flatmap(lambda file: st.tuples(st.just(file), damaged(files[file]))))
    def check(example: tuple[Path, bytes]) -> None:
        file, data = example
        file.write_bytes(data)
        try:
            with little_memory(ROOM):
                read(tmp_path / "model")
            outcomes["read"] += 1
        except kbit.KbitError as error:
            outcomes[type(error).__name__] += 1
        finally:
            file.write_bytes(files[file])

    check()
    if "KBIT_TEST_EXAMPLES" in os.environ:
        with capsys.disabled():
            print(f"\n{name}: {outcomes.total()} files, {dict(outcomes.most_common())}")
    if results := os.environ.get("KBIT_FUZZ_RESULTS"):
        note(Path(results), name, dict(outcomes.most_common()))


def note(results: Path, name: str, outcomes: dict[str, int]) -> None:
    """Add how the files of one format ended to the JSON in ``results``."""
    found = json.loads(results.read_text()) if results.exists() else {}
    results.write_text(json.dumps({**found, name: outcomes}))


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@pytest.mark.parametrize("layers", [1, 4])
def test_importing_takes_no_more_than_four_times_the_file(layers: int, tmp_path: Path) -> None:
    rows, columns = 32768 // layers, 2048
    words = {"qweight": random((columns // 16, rows)), "qzeros": random((1, rows // 16)), "scales": torch.rand(1, rows).half()}
    tensors = {f"{layer}.{name}": tensor.clone() for layer in range(layers) for name, tensor in words.items()}
    write(tmp_path, tensors, quant_method="gptq", bits=2, group_size=-1)

    def load() -> nn.Module:
        return kbit.from_checkpoint(tmp_path, lambda: nn.Sequential(*(nn.Linear(columns, rows, bias=False) for _ in range(layers))))

    load()  # what is loaded once
    trim_heap()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    load()
    size = (tmp_path / "model.safetensors").stat().st_size
    assert status("VmHWM") - before <= 4 * size + WORKING  # floats would be 16 times the size, and codes as bytes 4 times
