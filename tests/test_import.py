"""Packed models of other projects: the values are theirs. The files are written here, as the formats are specified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packed_files import HALF, Model, imported, write
from torch import Tensor, nn

import kbit_inductor as kbit
from kbit_inductor.models.importers import coded as importing
from kbit_inductor.models.importers.fields import pack_fields, unpack_fields
from kbit_inductor.testing.strategies import SEEDS


def words_of(fields: Any, bits: int) -> Any:
    """Fields ``[R, n]`` in words of 32 bits: Python's integers, a stream with the lowest bits first."""
    words = []
    for row in fields.tolist():
        stream = sum(value << (bits * i) for i, value in enumerate(row))
        words.append([stream >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return np.array(words, dtype=np.uint32).view(np.int32)


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), SEEDS)
def test_fields_are_a_stream_of_bits(bits: int, rows: int, count: int, seed: int) -> None:
    fields = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint8)
    words = torch.from_numpy(words_of(fields, bits))
    assert torch.equal(pack_fields(torch.from_numpy(fields), bits), words)
    assert torch.equal(unpack_fields(words, bits, count), torch.from_numpy(fields))


class Coded:
    """Codes, zero points and scales of groups, and the values ``[N, K]`` that they are."""

    def __init__(
        self, rows: int, columns: int, bits: int, group_size: int, seed: int, zeros: tuple[int, int] | None = None
    ) -> None:
        random = np.random.default_rng(seed)
        groups = -(-columns // group_size)
        self.codes = random.integers(0, 2**bits, (rows, columns))
        middle = 2 ** (bits - 1)
        self.zero = random.integers(*(zeros or (middle, middle + 1)), (rows, groups))
        self.scale = random.uniform(0.001, 0.01, (rows, groups)).astype(np.float16)
        self.group = np.arange(columns) // group_size

    def values(self) -> Tensor:
        values = self.scale.astype(np.float64)[:, self.group] * (self.codes - self.zero[:, self.group])
        return torch.from_numpy(values.astype(np.float32))


def zero_words(zero: Any, bits: int, less: int) -> Any:
    """Zero points ``[G, N]``, less one in the older convention: of the whole word at once, as GPTQModel does, but for 3 bits."""
    if 32 % bits:
        return words_of((zero - less) & (2**bits - 1), bits)
    return words_of(zero, bits) - np.int32(sum(less << place for place in range(0, 32, bits)))


def gptq(coded: Coded, bits: int, less: int, act_order: bool = False) -> dict[str, Any]:
    tensors = {
        "fc.qweight": words_of(coded.codes, bits).T,
        "fc.qzeros": zero_words(coded.zero.T, bits, less),
        "fc.scales": coded.scale.T,
        "fc.bias": np.arange(len(coded.codes), dtype=np.float16),
    }
    return {**tensors, "fc.g_idx": coded.group.astype(np.int32)} if act_order else tensors


@pytest.mark.parametrize("style", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, style: str) -> None:
    coded = Coded(64, 96, bits, 32, bits)
    write(tmp_path, gptq(coded, bits, style == "gptq"), quant_method="gptq", bits=bits, group_size=32, checkpoint_format=style)
    layer = imported(tmp_path, 64, 96)
    assert torch.equal(layer.weight.dequantize(), coded.values())
    assert layer.weight.config.bits == bits and layer.weight.config.symmetric and layer.weight.error == 0
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), x @ coded.values().T + torch.arange(64))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_take_a_bit_or_a_rounding(tmp_path: Path, bits: int) -> None:
    coded = Coded(32, 64, bits, 32, bits, zeros=(0, 2**bits))
    write(tmp_path, gptq(coded, bits, 1), quant_method="gptq", bits=bits, group_size=32)
    exact, rounded = imported(tmp_path, 32, 64).weight, imported(tmp_path, 32, 64, exact=False).weight
    assert exact.config.bits == bits + 1 and exact.config.symmetric and exact.error == 0
    assert torch.equal(exact.dequantize(), coded.values())
    assert rounded.config.bits == bits and not rounded.config.symmetric and rounded.error > 0
    offset = (coded.scale.astype(np.float64) * coded.zero)[:, coded.group]
    difference = (rounded.packed.dequantize(torch.float64) - coded.values()).abs()
    assert bool((difference <= torch.from_numpy(offset) * HALF).all())


def test_columns_in_the_order_of_their_importance(tmp_path: Path) -> None:
    coded = Coded(32, 96, 4, 32, 0)
    coded.group = np.random.default_rng(0).permutation(coded.group)
    write(tmp_path / "theirs", gptq(coded, 4, 1, act_order=True), quant_method="gptq", bits=4, group_size=32, desc_act=True)
    model = kbit.from_checkpoint(tmp_path / "theirs", lambda: Model(32, 96))
    assert model.fc.weight.order is not None and torch.equal(model.fc.weight.dequantize(), coded.values())
    x = torch.randn(2, 96)
    y = model(x)
    torch.testing.assert_close(y, x @ coded.values().T + torch.arange(32))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), y)
    kbit.save(model, tmp_path / "ours")
    again = kbit.load(tmp_path / "ours", lambda: Model(32, 96))
    assert torch.equal(again(x), y)
    again.fc.weight.order.copy_(again.fc.weight.order.flip(0))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), y)
    assert torch.equal(kbit.dequantize_(model).fc.weight, coded.values())


@pytest.mark.parametrize("rows", [8, 40])
def test_awq(tmp_path: Path, rows: int) -> None:
    coded = Coded(rows, 64, 4, 32, 0, zeros=(0, 16))
    places = [8 * word + row for word in range(rows // 8) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    tensors = {
        "fc.qweight": words_of(coded.codes.T[:, places], 4),
        "fc.qzeros": words_of(coded.zero.T[:, places], 4),
        "fc.scales": coded.scale.T,
        "fc.bias": np.zeros(rows, dtype=np.float16),
    }
    write(tmp_path, tensors, quant_method="awq", bits=4, group_size=32, version="gemm")
    assert torch.equal(imported(tmp_path, rows, 64).weight.dequantize(), coded.values())


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(8, 64, 32), (40, 192, 64), (16, 256, 128), (8, 128, -1)])
def test_awq_for_products_of_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, group_size: int
) -> None:
    """As ``gemv.py`` and ``gemv_fast.py`` of AutoAWQ pack."""
    size = columns if group_size < 0 else group_size
    coded = Coded(rows, columns, 4, size, 0, zeros=(0, 16))
    groups, fields = columns // size, 8 * {32: 4, 64: 2}.get(size, 1)
    padding = ((0, 0), (0, -groups % fields))
    monkeypatch.setattr(importing, "AT_ONCE", 3 * columns)
    scale, bias = np.pad(coded.scale, padding), {"fc.bias": np.zeros(rows, dtype=np.float16)}
    told = {"quant_method": "awq", "bits": 4, "group_size": group_size}
    plain = {
        "fc.qweight": words_of(coded.codes, 4), "fc.qzeros": words_of(np.pad(coded.zero, padding), 4), "fc.scales": scale, **bias,
    }  # fmt: skip
    write(tmp_path, plain, **told, checkpoint_format="gemv")
    assert torch.equal(imported(tmp_path, rows, columns).weight.dequantize(), coded.values())

    # Each line is one step of pack_intweight.
    codes = coded.codes.reshape(rows, -1, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    codes = codes.reshape(rows, -1, 4, 4, 2).transpose(0, 1, 2, 4, 3)
    codes = codes.reshape(rows // 4, 4, columns // 64, 64).transpose(0, 2, 1, 3).reshape(rows // 4, columns, 4)
    words = (codes << np.array([0, 4, 8, 12])).sum(-1).astype(np.uint16).view(np.int16)
    offset = -(coded.scale.astype(np.float32) * coded.zero).astype(np.float16)
    fast = {"fc.qweight": words, "fc.qzeros": np.pad(offset, padding).T, "fc.scales": scale.T, **bias}
    write(tmp_path, fast, **told, version="GEMV_FAST")
    found = imported(tmp_path, rows, columns).weight
    wanted = coded.scale.astype(np.float64)[:, coded.group] * coded.codes + offset.astype(np.float64)[:, coded.group]
    assert torch.equal(found.packed.dequantize(torch.float64), torch.from_numpy(wanted))
    assert found.error == 0 and found.config.bits == 4


@pytest.mark.parametrize("format", ["pack-quantized", "int-quantized"])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"), [(4, True, 32), (4, False, 96), (3, False, 32), (8, True, 96), (8, False, 32)]
)
def test_compressed_tensors(tmp_path: Path, format: str, bits: int, symmetric: bool, group_size: int) -> None:
    middle = 2 ** (bits - 1)
    coded = Coded(32, 96, bits, group_size, bits, zeros=None if symmetric else (0, 2**bits))
    coded.group = np.random.default_rng(1).permutation(coded.group)
    tensors = {"fc.weight_scale": coded.scale, "fc.weight_g_idx": coded.group.astype(np.int32), "fc.bias": np.zeros(32, np.float32)}
    if format == "pack-quantized":
        tensors |= {"fc.weight_packed": words_of(coded.codes, bits), "fc.weight_shape": np.array([32, 96])}
        zero = words_of(coded.zero.T, bits).T
    else:
        tensors |= {"fc.weight": (coded.codes - middle).astype(np.int8)}
        zero = (coded.zero - middle).astype(np.int8)
    tensors |= {} if symmetric else {"fc.weight_zero_point": zero}
    size = {"strategy": "group", "group_size": group_size} if group_size < 96 else {"strategy": "channel"}
    told = {"weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, **size}}
    write(tmp_path, tensors, quant_method="compressed-tensors", format=format, config_groups={"group_0": told})
    found = imported(tmp_path, 32, 96).weight
    if symmetric or bits < 8:
        assert torch.equal(found.dequantize(), coded.values()) and found.error == 0
    else:
        offset = torch.from_numpy(coded.scale.astype(np.float64) * coded.zero)[:, coded.group]
        values = found.packed.dequantize(torch.float64)[:, found.order.argsort()]
        assert bool(((values - coded.values()).abs() <= offset * HALF).all())


def test_a_llama_of_gptq_layers(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, vocab_size=96, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).half().eval()
    tensors: dict[str, Any] = {}
    with torch.no_grad():
        for number, (name, layer) in enumerate(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                coded = Coded(*layer.weight.shape, 4, 32, number)
                layer.weight.copy_(coded.values())
                tensors |= {
                    key.replace("fc", f"model.layers.{name}"): value
                    for key, value in gptq(coded, 4, 1).items()
                    if "bias" not in key
                }
    tensors |= {name: value for name, value in model.state_dict().items() if "_proj" not in name and name != "lm_head.weight"}
    write(tmp_path, tensors)
    told = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}, "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(config.to_json_string(use_diff=False)), **told}))
    packed = kbit.from_checkpoint(tmp_path)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight and packed.dtype == torch.float16
    assert not any(parameter.is_meta for parameter in packed.parameters())
    state = kbit.dequantize_(packed).state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_mistakes_are_told(tmp_path: Path) -> None:
    coded = Coded(32, 64, 4, 32, 0)
    good, told = gptq(coded, 4, 1), {"quant_method": "gptq", "bits": 4, "group_size": 32}

    def fails(error: type[Exception], message: str, tensors: dict[str, Any] = good, **quantization: Any) -> None:
        with pytest.raises(error, match=message):
            imported(write(tmp_path, tensors, **{**told, **quantization}), 32, 64)

    fails(kbit.UnsupportedFormatError, "packed by 'quip'", quant_method="quip")
    fails(kbit.UnsupportedFormatError, "checkpoint_format 'marlin'", checkpoint_format="marlin")
    fails(kbit.CorruptModelError, "no tensor 'fc.qzeros'", {name: t for name, t in good.items() if "qzeros" not in name})
    fails(kbit.CorruptModelError, r"fc.qweight is \(3, 32\)", {**good, "fc.qweight": good["fc.qweight"][:3]})
    fails(kbit.CorruptModelError, "fc.qzeros is .* of torch.int16", {**good, "fc.qzeros": good["fc.qzeros"].astype(np.int16)})
    fails(kbit.CorruptModelError, "'bits' of the quantization is 'four'", bits="four")
    fails(kbit.NonFiniteWeightError, "'fc' has scales", {**good, "fc.scales": good["fc.scales"] * np.float16("nan")})
    fails(kbit.UnsupportedFormatError, "not of 32 columns each", {**good, "fc.g_idx": np.zeros(64, dtype=np.int32)})
    fails(kbit.ModelMismatchError, "has no 'fc.bias'", {name: t for name, t in good.items() if "bias" not in name})
    with pytest.raises(kbit.NotAModelFolderError, match=r"no config\.json"):
        kbit.from_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    with pytest.raises(kbit.NotAModelFolderError, match="pickled files"):
        kbit.from_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.bias": "../other.safetensors"}}))
    with pytest.raises(kbit.CorruptModelError, match="none of its folder"):
        kbit.from_checkpoint(tmp_path)
