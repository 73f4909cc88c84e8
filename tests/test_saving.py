"""Models on disk: what is saved is what is loaded, in little memory, and what is damaged is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_surgery import IDS, OPTIONS, Model
from test_surgery import model as float_model
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.models.modelfile import MANIFEST, sha256
from kbit_inductor.models.modules import PackedLinear, PackedMatrix
from kbit_inductor.packing import PackedWeight, specs_by_name


@pytest.fixture(autouse=True)
def _quick(one_thread_without_grad: None) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test may change."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    kbit.save(kbit.quantize_(float_model(), OPTIONS), folder)
    return folder


def manifest(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / MANIFEST).read_text())
    return found


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a saved model in ``target``, in place of what is there."""
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        path.unlink()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_loaded_model_is_the_one_that_was_saved(saved: Path) -> None:
    packed = kbit.quantize_(float_model(), OPTIONS)
    loaded = kbit.load(saved, Model).eval()
    assert torch.equal(loaded(IDS), packed(IDS))
    assert loaded.head.weight is loaded.table.weight
    assert loaded.up.weight.error == packed.up.weight.error and loaded.up.weight.kernel == packed.up.weight.kernel
    assert loaded.down.bias.requires_grad
    in_place = float_model()
    assert kbit.load(saved, in_place) is in_place and torch.equal(in_place(IDS), packed(IDS))


def test_the_files_are_safetensors_in_the_storage_format(saved: Path) -> None:
    from safetensors.torch import load_file

    found = manifest(saved)
    assert (found["format"], found["version"]) == ("kbit-inductor model", 1)
    tensors = {name: t for path in saved.glob("*.safetensors") for name, t in load_file(path).items()}
    state = kbit.quantize_(float_model(), OPTIONS).state_dict()
    assert set(tensors) == {name for name in state if not name.startswith("head.")}  # tied: once
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    assert all(entry["sha256"] == sha256(tensors[name]) for name, entry in found["tensors"].items())  # type: ignore[attr-defined]


def test_every_option_of_the_format_and_shards(tmp_path: Path) -> None:
    options = {
        "overrides": {
            "table": {"bits": 8}, "query": {"bits": 1, "symmetric": True}, "key": {"bits": 3, "codebook": "normal"},
            "gate": {"bits": 5, "group_size": -1}, "up": {"bits": 1, "activation_bits": 1},
        },
        "skip": ["down"],
    }  # fmt: skip
    packed = kbit.quantize_(float_model(), options)
    kbit.save(packed, tmp_path, shard_bytes=3000)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) > 2
    loaded = kbit.load(tmp_path, Model).eval()
    assert torch.equal(loaded(IDS), packed(IDS))
    assert type(loaded.down) is nn.Linear and loaded.up.weight.layout == packed.up.weight.layout == "vectors"
    moved = kbit.load(tmp_path, Model, device="meta")
    assert moved.up.weight.device.type == moved.down.weight.device.type == "meta"


class Buffers(nn.Module):
    """Tied parameters, buffers outside of the state dict, and no packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3))
        self.b = self.a
        self.register_buffer("kept", torch.arange(4, dtype=torch.bfloat16))
        self.register_buffer("table", torch.randn(2, 5)[:, 1:], persistent=False)
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("nothing", torch.empty(0, 3))


def test_parameters_and_buffers_that_are_not_packed(tmp_path: Path) -> None:
    original = Buffers()
    kbit.save(original, tmp_path)
    loaded = kbit.load(tmp_path, Buffers)
    assert loaded.a is loaded.b
    for name in ("a", "kept", "table", "flag", "nothing"):
        assert torch.equal(getattr(loaded, name), getattr(original, name)) and not getattr(loaded, name).is_meta


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Whisper", "Mixtral"])
def test_models_of_transformers_need_no_class(name: str, tmp_path: Path) -> None:
    original, inputs = models.build(name)
    kbit.quantize_(original, OPTIONS)
    kbit.save(original, tmp_path)
    loaded = kbit.load(tmp_path)
    assert type(loaded) is type(original) and not loaded.training
    assert torch.equal(loaded(**inputs).logits, original(**inputs).logits)
    assert loaded.generation_config.to_dict() == original.generation_config.to_dict()


SIZES = [(16384, 1024), *[(2048, 1024)] * 36, *[(128, 1024)] * 64]  # many small ones, after which memory is given back now and then
MEASURE = f"""
import sys
import torch
from torch import nn
import kbit_inductor as kbit
from kbit_inductor.weights.release import trim_heap

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
folder = sys.argv[1]
kbit.load(folder + "/small", lambda: nn.Sequential(nn.Linear(64, 64)))  # what is loaded once, whatever the model
trim_heap()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
model = kbit.load(folder + "/large", lambda: nn.Sequential(*[nn.Linear(k, n, bias=False) for n, k in {SIZES}]))
print((status("VmHWM") - before) / sum(layer.weight.packed.nbytes for layer in model))

kbit.quantize_(nn.Sequential(nn.Linear(64, 64)))
del model
trim_heap()
before = status("VmRSS")
model = nn.Sequential(*[nn.Linear(k, n, bias=False) for n, k in [(8192, 1024)] + [(1024, 1024)] * 16])
floats = sum(layer.weight.nbytes for layer in model)
open("/proc/self/clear_refs", "w").write("5")
kbit.quantize_(model, {{"bits": 4}})
print((status("VmHWM") - before) / floats)
"""


def test_packing_takes_little_more_memory_than_the_floats_and_loading_than_the_packed_weights(tmp_path: Path) -> None:
    config = kbit.LayerConfig(4)
    layers = []
    for rows, columns in SIZES:  # what the codes are does not matter, and to quantize would take long
        specs = specs_by_name(rows, columns, config).values()
        packed = PackedWeight(tuple(torch.ones(shape, dtype=dtype) for shape, dtype in specs), config, columns, 0.0)
        layers.append(PackedLinear(PackedMatrix(packed, rows, torch.float32), None))
    kbit.save(nn.Sequential(*layers), tmp_path / "large")
    kbit.save(kbit.quantize_(nn.Sequential(nn.Linear(64, 64)), OPTIONS), tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loading, packing = map(float, done.stdout.split())
    assert loading <= 1.2  # the float weights would be 7.1
    assert packing <= 1.1  # 1.6 where the largest weight, a third of all, is converted at once and first


def test_saving_replaces_a_model_in_one_step(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path / "model")
    old = kbit.load(folder, Model).eval()
    before = old(IDS)
    other = kbit.quantize_(float_model(), {**OPTIONS, "bits": 2})
    (folder / ".kbit-left-by-a-crash").write_text("")
    (folder / "tokenizer.json").write_text("not ours")
    kbit.save(other, folder)
    assert torch.equal(kbit.load(folder, Model).eval()(IDS), other(IDS))
    assert torch.equal(old(IDS), before)  # its files are gone, what is mapped stays
    assert {path.name for path in folder.iterdir()} == {MANIFEST, "tokenizer.json", *files(folder)}


def files(folder: Path) -> set[str]:
    return {entry["file"] for entry in manifest(folder)["tensors"].values()}  # type: ignore[attr-defined]


def test_a_save_that_fails_leaves_the_old_model(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of(saved, tmp_path / "model")
    names = {path.name for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kbit_inductor.models.modelfile.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        kbit.save(kbit.quantize_(float_model(), {**OPTIONS, "bits": 2}), folder)
    assert {path.name for path in folder.iterdir()} == names
    kbit.load(folder, Model)


def test_a_killed_save_leaves_the_old_or_the_new_model(tmp_path: Path) -> None:
    """And so do two that save at once, and a full disk. ``KBIT_TEST_KILLS`` says how many are killed."""
    kills = os.environ.get("KBIT_TEST_KILLS", "3")
    command = [sys.executable, Path(__file__).with_name("kills.py"), tmp_path / "model", kills]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # shown by -rP
    seen = json.loads(done.stdout)
    assert seen["killed"] == int(kills) and seen["disk full"] == 1 and "half" not in seen
    assert seen["whole"] == int(kills) + seen["read while two save"] + 1


def test_the_pages_have_the_results_of_the_last_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import llama_tokens
    import loading
    import package
    import reliability

    for module in (llama_tokens, loading, package, reliability):
        results = json.loads(module.RESULTS.read_text())
        assert "\n".join(module.table(results)) in module.PAGE.read_text(encoding="utf-8")
    kills = json.loads(reliability.RESULTS.read_text())["kills"]
    assert kills["whole"] == kills["killed"] + kills["read while two save"] + 1
    loads = [row["peak_over_packed"] for row in json.loads(loading.RESULTS.read_text())["rows"] if row["call"] == "load"]
    assert loads and max(loads) <= 1.2


Change = Callable[[dict[str, object]], object]


def changed(saved: Path, target: Path, change: Change) -> Path:
    """A copy of ``saved`` whose description ``change`` has edited."""
    folder = copy_of(saved, target)
    found = manifest(folder)
    change(found)
    (folder / MANIFEST).write_text(json.dumps(found))
    return folder


def update(**values: object) -> Change:
    return lambda found: found.update(values)


def tensor(name: str, **values: object) -> Change:
    return lambda found: found["tensors"][name].update(values)  # type: ignore[index]


def weight(**values: object) -> Change:
    return lambda found: found["weights"][1].update(values)  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (update(version=3), kbit.FormatVersionError, "version 3 of the format, this release reads 1 and 2"),
        (update(format="other"), kbit.CorruptModelError, "does not describe a model"),
        (update(weights={}), kbit.ModelMismatchError, "has '"),
        (update(tensors=[]), kbit.CorruptModelError, "damaged"),
        (update(aliases={"x": "y"}), kbit.CorruptModelError, "no tensor 'y'"),
        (tensor("down.bias", file="../../etc/passwd"), kbit.CorruptModelError, "no file of a model has"),
        (tensor("down.bias", file="/etc/passwd"), kbit.CorruptModelError, "no file of a model has"),
        (tensor("down.bias", file="weights-0000000000000000.safetensors"), kbit.CorruptModelError, "damaged or missing"),
        (tensor("down.bias", shape=[63]), kbit.CorruptModelError, "not what was saved"),
        (tensor("down.bias", dtype="float16"), kbit.CorruptModelError, "not what was saved"),
        (tensor("down.bias", dtype="object"), kbit.CorruptModelError, "the dtype is 'object'"),
        (tensor("down.bias", sha256="00"), kbit.CorruptModelError, "not what was saved"),
        (weight(rows=10**15), kbit.ModelMismatchError, "the saved one"),
        (weight(rows=-1), kbit.CorruptModelError, "damaged"),
        (weight(columns=True), kbit.CorruptModelError, "damaged"),
        (weight(layers=["nowhere"]), kbit.ModelMismatchError, "no layer 'nowhere'"),
        (weight(layers=[]), kbit.CorruptModelError, "damaged"),
        (weight(options={"bits": 9}), kbit.CorruptModelError, "damaged"),
        (lambda found: found["tensors"].pop("down.bias"), kbit.ModelMismatchError, "given model has 'down.bias'"),  # type: ignore[attr-defined]
        (lambda found: found["tensors"].pop("up.weight.scale"), kbit.CorruptModelError, "no tensor 'up.weight.scale'"),  # type: ignore[attr-defined]
        (
            lambda found: found["weights"][1]["options"].update(bits=3),  # type: ignore[index]
            kbit.CorruptModelError,
            "fits no",
        ),
    ],
)  # fmt: skip
def test_a_wrong_description_is_refused(saved: Path, tmp_path: Path, change: Change, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        kbit.load(changed(saved, tmp_path / "model", change), Model)


def test_mistakes_are_told_by_name(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(kbit.NotAModelFolderError, match="is no folder"):
        kbit.load(tmp_path / "nowhere", Model)
    with pytest.raises(kbit.NotAModelFolderError, match=r"no kbit\.json"):
        kbit.load(tmp_path, Model)
    with pytest.raises(kbit.ModelMismatchError, match="no model of transformers"):
        kbit.load(saved)
    with pytest.raises(kbit.ModelMismatchError, match="no layer"):
        kbit.load(saved, Buffers)
    (tmp_path / "file").write_text("")
    with pytest.raises(kbit.NotAModelFolderError, match="is a file"):
        kbit.save(float_model(), tmp_path / "file")
    with pytest.raises(kbit.UnsavableModelError, match="cannot be saved"):
        kbit.save(float_model().to("meta"), tmp_path / "other")
    with pytest.raises(kbit.InvalidOptionError, match="shard_bytes"):
        kbit.save(float_model(), tmp_path / "other", shard_bytes=0)
    with (tmp_path / MANIFEST).open("wb") as large:
        large.truncate(1 << 40)  # takes no room on the disk, and would take some in memory
    with pytest.raises(kbit.CorruptModelError, match="larger than"):
        kbit.load(tmp_path, Model)


class OnTheSide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.table = torch.arange(4)


def test_a_tensor_that_is_nowhere_in_the_files_is_told(tmp_path: Path) -> None:
    kbit.save(kbit.quantize_(OnTheSide(), OPTIONS), tmp_path)
    with pytest.raises(kbit.ModelMismatchError, match="attribute 'table'"):
        kbit.load(tmp_path, OnTheSide)
    assert isinstance(kbit.load(tmp_path, OnTheSide()).linear, PackedLinear)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(0)
    kbit.save(kbit.quantize_(nn.Sequential(nn.Linear(40, 30)), {"min_elements": 0}), folder)
    return folder


@settings(max_examples=int(os.environ.get("KBIT_FUZZED_FILES", "150")))
@given(st.data())
def test_a_damaged_file_is_refused_or_changes_nothing(small: Path, data: st.DataObject) -> None:
    folder = copy_of(small, small.parent / "damaged")
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "header"])):
        case "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "overwrite":
            start = data.draw(st.integers(0, len(content) - 1))
            content[start : start + 8] = data.draw(st.binary(min_size=8, max_size=8))
        case "insert":
            start = data.draw(st.integers(0, len(content)))
            content[start:start] = data.draw(st.binary(min_size=1, max_size=20))
        case "header":
            content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    path.write_bytes(content)
    make = lambda: nn.Sequential(nn.Linear(40, 30))  # noqa: E731
    try:
        loaded = kbit.load(folder, make)
    except kbit.KbitError as error:
        assert isinstance(error, (kbit.CorruptModelError, kbit.FormatVersionError, kbit.ModelMismatchError))
    else:  # what nobody reads may be anything, white space and what is told about the error for two
        assert torch.equal(loaded[0].weight.dequantize(), wanted(small))


def wanted(folder: Path) -> Tensor:
    return kbit.load(folder, lambda: nn.Sequential(nn.Linear(40, 30)))[0].weight.dequantize()
