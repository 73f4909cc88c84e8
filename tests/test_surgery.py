"""Models whose modules were swapped for packed ones: eager, compiled, exported, copied, moved, saved by torch."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.calibration import warn_lacking
from kbit_inductor.kernels import reference
from kbit_inductor.models.modules import PackedLinear, PackedMatrix, matrix_of
from kbit_inductor.packing import pack
from kbit_inductor.testing import relative_error
from kbit_inductor.testing import strategies as own

OPTIONS = {"bits": 4, "group_size": 32}
IDS = torch.arange(10).view(2, 5)


class Model(nn.Module):
    """A tied head, siblings, a gate, a residual sum: something for every fusion but attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = self.query(h) * self.key(h)
        h = h + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return self.head(h)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(autouse=True)
def _quick(one_thread_without_grad: None) -> Iterator[None]:
    yield


def test_eager_is_the_float_model_on_the_values_that_the_codes_stand_for() -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    floats = kbit.dequantize_(copy.deepcopy(packed))
    assert relative_error(packed(IDS), floats(IDS)) < 1e-6
    assert 0 < relative_error(packed(IDS), model()(IDS)) < 0.5


def test_the_backend_gives_what_it_gives_on_a_float_model_with_the_same_fusions() -> None:
    floats, packed = model(), kbit.quantize_(model(), OPTIONS)
    wanted = torch.compile(floats, backend="kbit", options=OPTIONS)(IDS)
    assert torch.equal(torch.compile(packed, backend="kbit")(IDS), wanted)
    fusions = kbit.explain(floats, IDS, config=OPTIONS).fusions
    assert fusions == {"siblings": 4, "gate": 1, "residual": 1, "chained": 3}
    explained = kbit.explain(packed, IDS)
    assert explained.fusions == fusions
    assert {layer.name for layer in explained.matched} == {"table = head", "query", "key", "gate", "up", "down"}
    assert explained.layer("query").bytes_after == packed.query.weight.packed.nbytes


def test_siblings_of_different_groups_are_not_merged() -> None:
    packed = kbit.quantize_(model(), {**OPTIONS, "overrides": {"key": {"group_size": 16}}})
    assert kbit.explain(packed, IDS).fusions["siblings"] == 2
    assert relative_error(torch.compile(packed, backend="kbit")(IDS), packed(IDS)) < 1e-6


def test_inductor_and_export() -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    assert relative_error(torch.compile(packed, backend="inductor")(IDS), packed(IDS)) < 1e-6
    exported = torch.export.export(packed, (IDS,), dynamic_shapes={"ids": {0: torch.export.Dim.DYNAMIC}})
    assert torch.equal(exported.module()(IDS[:1]), packed(IDS[:1]))
    assert not any(tensor.is_floating_point() and tensor.dim() > 1 for tensor in exported.state_dict.values())


def test_copies_and_pickles_keep_tied_weights_one() -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    for other in (copy.deepcopy(packed), torch.load(file, weights_only=False), kbit.dequantize_(copy.deepcopy(packed))):
        assert other.head.weight is other.table.weight
        assert relative_error(other(IDS), packed(IDS)) < 1e-6
    assert type(other.head) is nn.Linear and type(other.table) is nn.Embedding


def test_a_state_dict_has_the_storage_format_and_fits_every_device() -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    state = packed.state_dict()
    keys = {f"query.weight.{name}" for name in ("planes", "scale", "offset", "global_scale")} | {"query.bias"}
    assert {key for key in state if key.startswith("query.")} == keys
    assert state["head.weight.planes"] is state["table.weight.planes"]
    values = reference.dequantize(*(state[f"up.weight.{n}"] for n in ("planes", "scale", "offset", "global_scale")), 64, 32)
    assert torch.equal(values, packed.up.weight.dequantize())

    torch.manual_seed(1)
    other = kbit.quantize_(Model().eval(), OPTIONS)
    other.load_state_dict(state)
    assert torch.equal(other(IDS), packed(IDS))
    empty = copy.deepcopy(packed).to("meta")
    assert empty.up.weight.layout == "planes" and empty.up.weight.device.type == "meta"
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty(IDS), packed(IDS))


def test_a_state_dict_of_another_format_is_refused() -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    before = packed(IDS)
    with pytest.raises(RuntimeError, match=r"query.weight.planes is \(3, 64, 8\).*has \(4, 64, 8\)"):
        packed.load_state_dict(kbit.quantize_(model(), {**OPTIONS, "bits": 3}).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*query.weight.offset"):
        packed.load_state_dict(kbit.quantize_(model(), {**OPTIONS, "symmetric": True}).state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*query.weight.offset"):
        kbit.quantize_(model(), {**OPTIONS, "symmetric": True}).load_state_dict(packed.state_dict())
    assert torch.equal(packed(IDS), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_codes_alone(dtype: torch.dtype) -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    state, wanted = packed.state_dict(), packed(IDS)
    packed.to(dtype)
    assert packed(IDS).dtype == packed.head.weight.dtype == dtype
    assert relative_error(packed(IDS), wanted) < 2e-2
    assert all(torch.equal(packed.state_dict()[key], state[key]) for key in state if "weight" in key)
    assert packed.up.weight.kernel == ("reference" if dtype == torch.float64 else "cpu")
    assert relative_error(packed.float()(IDS), wanted) < 2e-2
    with pytest.raises(kbit.UnsupportedDtypeError, match="cannot be cast"):
        packed.type(torch.float16)


def test_autocast_reaches_packed_modules() -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed.up(torch.randn(2, 64)).dtype == torch.bfloat16


def test_gradients_pass_through_packed_weights_and_reach_biases() -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    with torch.enable_grad():
        x = torch.randn(3, 64, requires_grad=True)
        packed.query(x).square().sum().backward()
    grad = 2 * packed.query(x) @ packed.query.weight.dequantize()
    assert x.grad is not None and relative_error(x.grad, grad) < 1e-5
    assert packed.query.bias.grad is not None and not list(packed.query.weight.parameters())


def test_names_skip_and_options_are_those_of_the_backend() -> None:
    options = {**OPTIONS, "skip": ["head"], "overrides": {"re:gate|up": {"bits": 2}}}
    packed = kbit.quantize_(model(), options)
    assert type(packed.head) is nn.Linear and type(packed.table) is nn.Embedding  # tied: one is skipped, so both stay
    assert packed.head.weight is packed.table.weight
    bits = {name: matrix.config.bits for name, m in packed.named_modules() if (matrix := matrix_of(m)) is not None}
    assert bits == {"query": 4, "key": 4, "gate": 2, "up": 2, "down": 4}
    assert relative_error(torch.compile(packed, backend="kbit", options=options)(IDS), packed(IDS)) < 0.2  # the rest is packed now
    with pytest.raises(kbit.UnmatchedOverrideError, match="gates"):
        kbit.quantize_(model(), {"skip": ["gates"]})


def test_bits_are_chosen_and_calibration_is_used() -> None:
    planned = kbit.quantize_(model(), {"bits": "auto", "average_bits": 3.4, "group_size": 32})
    assert len({m.weight.config.bits for m in planned.modules() if isinstance(m, PackedLinear)}) > 1
    data = [torch.randint(0, 100, (4, 8)) for _ in range(2)]
    plain = kbit.quantize_(model(), {**OPTIONS, "bits": 2})
    weighted = kbit.quantize_(model(), {**OPTIONS, "bits": 2}, data)
    assert not torch.equal(plain.down.weight.dequantize(), weighted.down.weight.dequantize())
    source = model()
    again = kbit.quantize_(source, {**OPTIONS, "bits": 2}, kbit.calibrate(source, data, OPTIONS))
    assert torch.equal(again.down.weight.dequantize(), weighted.down.weight.dequantize())


def test_what_cannot_be_swapped_stays() -> None:
    shared = nn.Linear(64, 64)
    other = nn.Sequential(
        shared, shared, nn.MultiheadAttention(64, 4), nn.Embedding(50, 64, max_norm=1.0), nn.Linear(4, 4), nn.Linear(64, 64)
    )
    other[5].register_forward_hook(lambda *_: None)
    kbit.quantize_(other, OPTIONS)
    assert isinstance(other[0], PackedLinear) and other[0] is other[1]
    assert not any(isinstance(module, PackedMatrix) for module in other[2:].modules())
    other[2](*[torch.randn(3, 2, 64)] * 3)


def test_a_bad_weight_leaves_the_model_as_it_was() -> None:
    broken = model()
    broken.down.weight[3, 5] = torch.nan
    with pytest.raises(kbit.NonFiniteWeightError, match="down"):
        kbit.quantize_(broken, OPTIONS)
    assert not any(isinstance(module, PackedMatrix) for module in broken.modules())


@settings(max_examples=15)
@given(
    own.BITS, own.GROUPS, st.booleans(), st.sampled_from(["uniform", "normal"]), st.integers(1, 40), st.integers(1, 70), own.SEEDS
)
def test_layouts_hold_the_same_bits(
    bits: int, group_size: int, symmetric: bool, codebook: str, rows: int, columns: int, seed: int
) -> None:
    config = kbit.LayerConfig(bits, group_size, symmetric, codebook=codebook)
    planes = pack(own.normal((rows, columns), seed), config)
    for layout in ("tiled", "vectors") if codebook == "uniform" else ("tiled",):
        there = planes.laid_out(layout)
        back = there.laid_out("planes")
        assert len(back.operands) == len(planes.operands)
        assert all(torch.equal(a, b) for a, b in zip(back.operands, planes.operands, strict=True))
        assert torch.equal(there.dequantize(), planes.dequantize())


def test_a_compiled_model_is_the_model_that_was_compiled(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 40)).eval()

    compiled, x = torch.compile(make(), backend="kbit"), torch.randn(2, 40)
    options = {"bits": 4, "quantizer": "gptq", "overrides": {"2": {"bits": 3}}}
    calibration = kbit.calibrate(compiled, x, options)
    assert calibration.layers.keys() == {"0", "2"}
    assert kbit.quantize_(compiled, options, calibration) is compiled
    kbit.save(compiled, tmp_path)
    assert torch.equal(kbit.load(tmp_path, make)(x), compiled.get_submodule("_orig_mod")(x))
    assert kbit.plan(torch.compile(make()), {"bits": "auto", "average_bits": 3}).overrides.keys() == {"0", "2"}


def test_what_quantize_does_without_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("kbit_inductor"), "propagate", True)
    warn_lacking.cache_clear()
    kbit.quantize_(nn.Sequential(nn.Linear(40, 48)), {"quantizer": "gptq"})
    assert "'gptq' does without the Hessian" in caplog.text
    kbit.quantize_(nn.Linear(40, 48))
    assert "put it into a module" in caplog.text
    kbit.quantize_(nn.Sequential(nn.Linear(4, 4)))
    assert "packed no weight of the Sequential: KBIT_LOGS=pack" in caplog.text
    monkeypatch.setenv("KBIT_LOGS", "no such topic")
    with pytest.raises(kbit.InvalidOptionError, match="KBIT_LOGS"):
        kbit.quantize_(nn.Sequential(nn.Linear(40, 48)))


def test_an_encoder_of_torch_takes_packed_layers() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = kbit.quantize_(nn.TransformerEncoder(layer, 2).eval(), {"min_elements": 0})
    assert isinstance(model.get_submodule("layers.0.linear1"), PackedLinear)
    x, padding = torch.randn(2, 5, 32), torch.arange(5).expand(2, 5) > 3
    floats = kbit.dequantize_(copy.deepcopy(model))
    with torch.no_grad():  # where float layers take a fast path that reads their weights
        y, expected = (each(x, src_key_padding_mask=padding)[:, :4] for each in (model, floats))
    assert relative_error(y, expected) < 1e-5


def test_a_packed_weight_is_no_tensor() -> None:
    (layer,) = kbit.quantize_(nn.Sequential(nn.Linear(40, 48)))
    with pytest.raises(TypeError, match=r"linear was given a packed weight.*dequantize\(\)"):
        nn.functional.linear(torch.randn(2, 40), layer.weight)


def test_a_pickled_model_works_in_a_process_that_packs_nothing(tmp_path: Path) -> None:
    model = kbit.quantize_(nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64)))
    torch.save((model, IDS, model(IDS)), tmp_path / "model.pt")
    code = "import torch; model, ids, y = torch.load('model.pt', weights_only=False); assert torch.equal(model(ids), y)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
