"""Packed weights by transformers' own ways: from_pretrained, save_pretrained, generate, dequantize."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kbit_inductor as kbit
from kbit_inductor.models.modules import PackedLinear
from kbit_inductor.models.surgery import packed_matrices
from kbit_inductor.pretrained import KbitConfig, KbitQuantizer

IDS = torch.arange(1, 9)[None]
OVERRIDES = {"re:.*v_proj": {"bits": 3, "codebook": "normal"}, "re:.*o_proj": {"low_rank": 2, "outliers": 0.03}}
OPTIONS: dict[str, Any] = {"bits": 4, "group_size": 32, "overrides": OVERRIDES}


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=200, attention_bias=True, tie_word_embeddings=tied)).eval()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A float model."""
    model = llama(request.param)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros of a new model would hide that they were not read
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "floats")
    return tmp_path / "floats"


def loaded(folder: Path, **told: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **told)


@torch.no_grad()
def test_packed_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    floats = loaded(folder)
    by_hand = kbit.quantize_(loaded(folder), OPTIONS)
    packed = loaded(folder, quantization_config=KbitConfig(**OPTIONS))
    assert torch.equal(packed(IDS).logits, by_hand(IDS).logits) and not torch.equal(packed(IDS).logits, floats(IDS).logits)
    packed.save_pretrained(tmp_path / "packed")
    again = loaded(tmp_path / "packed")
    assert torch.equal(again(IDS).logits, packed(IDS).logits)
    assert list(packed_matrices(again).values()) == list(packed_matrices(packed).values())
    assert not again.training and isinstance(again.model.layers[0].self_attn.q_proj, PackedLinear)
    sizes = [sum(file.stat().st_size for file in where.glob("*.safetensors")) for where in (folder, tmp_path / "packed")]
    assert sizes[1] < sizes[0] / 4
    assert again.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, 12)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(loaded(tmp_path / "twice")(IDS).logits, packed(IDS).logits)
    again.dequantize()
    torch.testing.assert_close(again(IDS).logits, packed(IDS).logits)
    assert type(again.lm_head) is nn.Linear and not packed_matrices(again)


@torch.no_grad()
def test_floats_are_never_made_while_a_packed_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama(True).save_pretrained(tmp_path / "floats")
    loaded(tmp_path / "floats", quantization_config=KbitConfig(bits=4)).save_pretrained(tmp_path / "packed")
    seen: list[set[str]] = []
    before = KbitQuantizer._process_model_after_weight_loading

    def look(self: KbitQuantizer, model: Any, **told: Any) -> None:
        seen.append({name for name, parameter in model.named_parameters() if parameter.dim() == 2})
        before(self, model, **told)

    monkeypatch.setattr(KbitQuantizer, "_process_model_after_weight_loading", look)
    loaded(tmp_path / "packed")
    assert seen == [set()]


def test_gradients_reach_what_is_around_packed_weights(tmp_path: Path) -> None:
    llama(True).save_pretrained(tmp_path)
    model = loaded(tmp_path, quantization_config=KbitConfig(bits=4))
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0
    assert model.model.layers[0].self_attn.q_proj.bias.grad.abs().sum() > 0


def damaged(folder: Path, change: Any) -> None:
    file = folder / "config.json"
    told = json.loads(file.read_text())
    change(told["quantization_config"])
    file.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda told: told.pop("weights"), kbit.CorruptModelError, "describes no packed weights"),
        (lambda told: told["weights"][0].update(rows=-1), kbit.CorruptModelError, "there cannot be"),
        (lambda told: told["weights"][0].update(rows=7), kbit.ModelMismatchError, "of the model is"),
        (lambda told: told["weights"][0].update(layers=["model.absent"]), kbit.ModelMismatchError, "no layer 'model.absent'"),
        (lambda told: told["weights"][0].update(layers=["model"]), kbit.ModelMismatchError, "is a LlamaModel"),
        (lambda told: told.update(bits=9), kbit.InvalidOptionError, "'bits' is 9"),
        (lambda told: told.update(bit=4), kbit.UnknownOptionError, "Did you mean 'bits'"),
    ],
)
def test_a_description_that_is_wrong(tmp_path: Path, change: Any, error: type[Exception], message: str) -> None:
    model = llama(True)
    model.save_pretrained(tmp_path / "floats")
    loaded(tmp_path / "floats", quantization_config=KbitConfig(bits=4)).save_pretrained(tmp_path / "packed")
    damaged(tmp_path / "packed", change)
    with pytest.raises(error, match=message):
        loaded(tmp_path / "packed")


def test_tensors_that_are_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    llama(True).save_pretrained(tmp_path / "floats")
    loaded(tmp_path / "floats", quantization_config=KbitConfig(bits=4)).save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight.planes"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(kbit.CorruptModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        loaded(tmp_path / "packed")


@pytest.mark.rounded_activations  # as the other process does
def test_another_process_needs_one_import(tmp_path: Path) -> None:
    llama(True).save_pretrained(tmp_path / "floats")
    packed = loaded(tmp_path / "floats", quantization_config=kbit.KbitConfig(bits=4))
    packed.save_pretrained(tmp_path / "packed")
    code = (
        "import sys, torch, kbit_inductor.pretrained\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.arange(1, 9)[None]).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "packed"), str(tmp_path / "logits")], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), packed(IDS).logits)
