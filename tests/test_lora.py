"""LoRA adapters of PEFT on packed weights: gradients, training, where they begin, and the way back to floats."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

import kbit_inductor as kbit
from kbit_inductor.models.surgery import packed_matrices
from kbit_inductor.quantizers.compensation import low_rank
from kbit_inductor.testing import relative_error

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
CONFIG = {"bits": 3, "group_size": 24}
RANK = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lora") / "floats"
    models.llama().save_pretrained(path)
    return path


def packed(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=kbit.KbitConfig(**CONFIG))


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids).loss


def test_gradients_are_those_on_the_float_values_and_training_lowers_the_loss(folder: Path) -> None:
    ids = models.ids()
    model = adapted(packed(folder))
    exact = adapted(kbit.dequantize_(packed(folder)))
    codes = {name: matrix.packed.operands[0].clone() for matrix, (name, *_) in packed_matrices(model).items()}
    assert len(codes) == 16  # the table and the head, which get no adapter, among them
    for each in (model, exact):
        for name, parameter in each.named_parameters():
            if "lora_B" in name:  # zeros, which would keep the gradients of A zero
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
        loss(each, ids).backward()
    wanted = {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == wanted.keys() and all("lora_" in name for name in trained)
    for name, parameter in trained.items():
        assert relative_error(parameter.grad, wanted[name]) < 1e-4, name
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(loss(model, ids))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(m.packed.operands[0], codes[name]) for m, (name, *_) in packed_matrices(model).items())


@torch.no_grad()
def test_adapters_begin_at_the_best_low_rank_part_of_the_error(folder: Path) -> None:
    floats = models.llama()
    floats.load_state_dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    ids = models.ids()
    calibration = kbit.calibrate(floats, {"input_ids": ids}, CONFIG)
    model = adapted(packed(folder))
    before = relative_error(model(ids).logits, floats(ids).logits)
    for statistics in (None, calibration):
        kbit.init_lora_(model, floats.state_dict(), statistics)
        assert relative_error(model(ids).logits, floats(ids).logits) < before
        layer = model.get_base_model().model.layers[1].mlp.down_proj
        root = torch.ones(88) if statistics is None else statistics.layers["model.layers.1.mlp.down_proj"].importance().sqrt()
        error = (floats.model.layers[1].mlp.down_proj.weight - layer.base_layer.weight.dequantize()) * root
        left = error - layer.get_delta_weight("default") * root
        best = torch.linalg.svdvals(error)[RANK:].square().sum()  # Eckart, Young, 1936
        torch.testing.assert_close(left.square().sum(), best, rtol=1e-4, atol=0)


def test_a_rank_that_is_larger_than_the_weight() -> None:
    error = torch.randn(3, 5)
    up, down = low_rank(error, 7)
    assert up.shape == (3, 7) and down.shape == (7, 5)
    torch.testing.assert_close(up @ down, error)


@torch.no_grad()
def test_adapters_are_saved_loaded_and_merged_into_floats(folder: Path, tmp_path: Path) -> None:
    ids = models.ids()
    floats = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = kbit.init_lora_(adapted(packed(folder)), floats).eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(packed(folder), tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    merged = kbit.dequantize_(copy.deepcopy(model)).merge_and_unload()
    assert relative_error(merged(ids).logits, model(ids).logits) < 1e-5 and not packed_matrices(merged)


def test_mistakes_are_told(folder: Path) -> None:
    model = packed(folder)
    with pytest.raises(kbit.ModelMismatchError, match="no packed layer has a LoRA adapter 'default'"):
        kbit.init_lora_(model, {})
    with pytest.raises(kbit.ModelMismatchError, match=r"q_proj\.weight is missing in the floats"):
        kbit.init_lora_(adapted(model), {})
    with pytest.raises(kbit.ModelMismatchError, match="'other'"):
        kbit.init_lora_(model, {}, adapter="other")
