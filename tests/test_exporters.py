"""Packed models in other projects' formats: what is written has the very same values, as their own readers see them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kbit_inductor as kbit
from kbit_inductor import LayerConfig
from kbit_inductor.cli import app as commands
from kbit_inductor.models.exporters.blocks import block_type, to_blocks
from kbit_inductor.packing import pack
from kbit_inductor.testing.strategies import SEEDS, normal

IDS = torch.arange(1, 9)[None]


def llama(tied: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, vocab_size=96, tie_word_embeddings=tied)
    return kbit.quantize_(transformers.LlamaForCausalLM(config).eval(), options)


def same(left: Any, right: Any) -> bool:
    mine, theirs = (kbit.dequantize_(model).state_dict() for model in (left, right))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name].float(), theirs[name].float()) for name in mine)


@given(
    st.integers(1, 8), st.sampled_from([32, 64, 96, -1]), st.booleans(), st.sampled_from(["uniform", "normal"]), st.integers(1, 4),
    st.integers(1, 20), SEEDS,
)  # fmt: skip
def test_blocks_have_the_values_of_packed_weights(
    bits: int, group_size: int, symmetric: bool, codebook: str, blocks: int, rows: int, seed: int
) -> None:
    config = LayerConfig(bits, group_size, symmetric, "rtn", codebook=codebook)
    weight = pack(normal((rows, 32 * blocks), seed), config)
    kind = block_type(weight)
    fits = (symmetric and bits > 1) or (bits <= 5 and not config.levels())
    assert (kind is not None) == fits
    if kind is not None:
        found = gguf.dequantize(to_blocks(weight, kind).numpy(), gguf.GGMLQuantizationType[kind])
        assert torch.equal(torch.from_numpy(found), weight.dequantize())


OVERRIDES: dict[str, Any] = {
    r"re:.*q_proj": {"bits": 3, "symmetric": True},
    r"re:.*v_proj": {"bits": 5},
    r"re:.*o_proj": {"bits": 7, "symmetric": True},
    r"re:.*up_proj": {"bits": 4, "symmetric": True, "codebook": "normal"},
}


def test_gguf_and_back(tmp_path: Path) -> None:
    model = llama(bits=4, group_size=32, end_bits=1, overrides=OVERRIDES)
    kbit.to_gguf(model, tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    again = kbit.from_gguf(tmp_path / "model.gguf")
    kbit.to_gguf(again, tmp_path / "again.gguf", like=tmp_path / "model.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    assert same(model, theirs) and same(model, again)


def test_gptq_and_back(tmp_path: Path) -> None:
    model = llama(tied=False, bits=4, group_size=32, symmetric=True, skip=["lm_head", "model.embed_tokens"])
    kbit.to_gptq(model, tmp_path)
    again = kbit.from_checkpoint(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.model.layers[0].mlp.up_proj.weight.config.bits == 4
    assert same(model, again)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(kbit.UnsavableModelError, match=r"exactly: model\.layers\.0-1\.self_attn\.q_proj; pack"):
        kbit.to_gguf(llama(bits=4, group_size=32, end_bits=1, overrides={r"re:.*q_proj": {"bits": 6}}), tmp_path / "model.gguf")
    with pytest.raises(kbit.UnsavableModelError, match=r"exactly: model\.embed_tokens"):
        kbit.to_gptq(llama(bits=4, group_size=32, symmetric=True), tmp_path / "folder")
    with pytest.raises(kbit.ModelMismatchError, match="a Linear has no form in GGUF"):
        kbit.to_gguf(torch.nn.Linear(2, 2), tmp_path / "model.gguf")
    (tmp_path / "text.gguf").write_text("no GGUF file at all")
    with pytest.raises(kbit.NotAModelFileError, match="no GGUF file"):
        kbit.to_gguf(llama(bits=4, group_size=32, end_bits=1), tmp_path / "model.gguf", like=tmp_path / "text.gguf")
    assert not (tmp_path / "model.gguf").exists() and not list(tmp_path.glob(".kbit*"))


def test_the_command_converts(tmp_path: Path) -> None:
    def convert(source: Path, target: Path, *told: str) -> Any:
        result = CliRunner().invoke(commands.app, ["convert", str(source), str(target), "--json", *told])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    kbit.save(llama(tied=False, bits=4, group_size=32, symmetric=True, skip=["lm_head", "model.embed_tokens"]), tmp_path / "kbit")
    convert(tmp_path / "kbit", tmp_path / "gptq", "--to", "gptq")
    convert(tmp_path / "gptq", tmp_path / "model.gguf", "--to", "gguf")
    sizes = convert(tmp_path / "model.gguf", tmp_path / "again")
    assert sizes["packed_weights"] == 14
    assert same(kbit.load(tmp_path / "again"), kbit.load(tmp_path / "kbit"))
    again = CliRunner().invoke(commands.app, ["convert", str(tmp_path / "kbit"), str(tmp_path / "model.gguf"), "--to", "gguf"])
    assert again.exit_code == 1 and "--force" in again.output
