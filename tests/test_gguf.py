"""GGUF files as packed models: the values are those of the file, to the last bit."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.lowering.registry import cpu_library_problem
from kbit_inductor.models.gguf_blocks import TYPES, packed_of
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.testing.strategies import SEEDS, normal

SIZES = {"hidden": 64, "inner": 96, "layers": 2, "heads": 4, "kv_heads": 2, "vocabulary": 96}
KINDS = {
    "attn_q": (64, 64, "Q4_0"), "attn_k": (32, 64, "Q4_1"), "attn_v": (32, 64, "Q5_0"), "attn_output": (64, 64, "Q5_1"),
    "ffn_gate": (96, 64, "Q8_0"), "ffn_up": (96, 64, "F16"), "ffn_down": (64, 96, "Q4_1"),
}  # fmt: skip


K_QUANTS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where a block's units are
HALF = 2.0**-11  # the relative error of a number rounded to float16


@given(st.sampled_from(sorted(TYPES.keys() - K_QUANTS.keys())), st.integers(1, 40), st.integers(1, 5), st.booleans(), SEEDS)
def test_values_are_those_of_gguf(kind: str, rows: int, blocks: int, shuffled: bool, seed: int) -> None:
    weight = normal((rows, 32 * blocks), seed).numpy()
    data = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    wanted = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
    order = torch.randperm(rows) if shuffled else None
    packed = packed_of(torch.from_numpy(data), kind, order)
    assert cpu_library_problem() is None  # loads it
    assert torch.equal(packed.dequantize(), wanted if order is None else wanted[order])
    assert torch.equal(packed.laid_out("tiled").dequantize(), packed.dequantize())
    assert packed.nbytes == data.nbytes + 4  # and a global scale
    assert packed.error == 0


def k_quants(kind: str, rows: int, blocks: int, seed: int) -> Any:
    """Any bytes at all, but for the units, which are small numbers."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * blocks, TYPES[kind].nbytes), dtype=np.uint8)
    for at in K_QUANTS[kind]:
        data[:, at : at + 2] = random.normal(scale=0.01, size=(rows * blocks, 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@given(st.sampled_from(sorted(K_QUANTS)), st.integers(1, 20), st.integers(1, 2), st.booleans(), SEEDS)
def test_codes_of_k_quants_are_those_of_gguf(kind: str, rows: int, blocks: int, shuffled: bool, seed: int) -> None:
    data = k_quants(kind, rows, blocks, seed)
    wanted = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind])).double()
    order = torch.randperm(rows) if shuffled else torch.arange(rows)
    packed = packed_of(torch.from_numpy(data), kind, order)
    found = packed.dequantize(torch.float64)
    # A step and a minimum are rounded, and nothing else. A value is at most the largest step times the largest level, and a
    # minimum.
    step, minimum = packed.operands[1].double().abs(), None if packed.config.symmetric else packed.operands[2].double().abs()
    levels = 2 ** (packed.config.bits - 1) if minimum is None else 2**packed.config.bits - 1
    unit = packed.operands[-1].double()
    most = (step * levels + (0 if minimum is None else minimum)) * HALF + 2.0**-25 * levels  # the latter where it is subnormal
    bound = (most * unit).repeat_interleave(packed.config.group_size, 1) * (1 + HALF) + wanted[
        order
    ].abs() * 2.0**-23  # theirs: float32
    assert bool(((found - wanted[order]).abs() <= bound).all())
    error = float((found - wanted[order]).square().sum() / wanted.square().sum())
    assert packed.error == pytest.approx(error, rel=1e-3, abs=1e-13)


def write(path: Path, **changes: str) -> Path:
    """A Llama of two layers, of every type, with a tied head."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SIZES["layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_feed_forward_length(SIZES["inner"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["vocabulary"])

    def add(name: str, shape: tuple[int, ...], kind: str) -> None:
        weight = normal(shape, len(name)).numpy() * 0.2
        if kind in ("F32", "F16"):
            return writer.add_tensor(name, weight.astype(np.float16 if kind == "F16" else np.float32))
        gguf_type = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(weight, gguf_type), raw_dtype=gguf_type)

    add("token_embd.weight", (SIZES["vocabulary"], SIZES["hidden"]), "Q8_0")
    add("output_norm.weight", (SIZES["hidden"],), "F32")
    for layer in range(SIZES["layers"]):
        for name, (rows, columns, kind) in KINDS.items():
            if changes.get(name) != "left out":
                add(f"blk.{layer}.{name}.weight", (rows, columns), changes.get(name, kind))
        add(f"blk.{layer}.attn_norm.weight", (SIZES["hidden"],), "F32")
        add(f"blk.{layer}.ffn_norm.weight", (SIZES["hidden"],), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_becomes_the_model_that_transformers_makes_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    packed = kbit.from_gguf(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    matrices = {matrix for matrix in packed.modules() if isinstance(matrix, PackedMatrix)}
    assert len(matrices) == 1 + 6 * SIZES["layers"] and packed.lm_head.weight is packed.model.embed_tokens.weight
    assert type(packed.model.layers[0].mlp.up_proj) is nn.Linear  # F16
    kbit.save(packed, tmp_path / "saved")
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(kbit.load(tmp_path / "saved")(ids).logits, packed(ids).logits)
    mine, wanted = kbit.dequantize_(packed).state_dict(), theirs.state_dict()
    assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, theirs(ids).logits)


def test_sizes_that_transformers_refuses_are_told(tmp_path: Path) -> None:
    whole, damaged = write(tmp_path / "tiny.gguf").read_bytes(), tmp_path / "damaged.gguf"
    key = b"llama.attention.head_count" + struct.pack("<I", gguf.GGUFValueType.UINT32)
    assert whole.count(key) == 1
    damaged.write_bytes(whole.replace(key + struct.pack("<I", SIZES["heads"]), key + struct.pack("<I", 5)))
    with pytest.raises(kbit.ModelMismatchError, match="not a multiple"):
        kbit.from_gguf(damaged)


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(kbit.NotAModelFileError, match="no file"):
        kbit.from_gguf(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("no GGUF file at all")
    with pytest.raises(kbit.NotAModelFileError, match="no GGUF file"):
        kbit.from_gguf(tmp_path / "text.gguf")
    with pytest.raises(kbit.ModelMismatchError, match=r"has no 'model\.layers\.0\.self_attn\.v_proj\.weight'"):
        kbit.from_gguf(write(tmp_path / "partial.gguf", attn_v="left out"))
