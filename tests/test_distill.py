"""Grids that are tuned so that a model predicts what it did in float."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threads import with_threads
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.calibrating import distillation
from kbit_inductor.outputs import divergence, rows_of
from kbit_inductor.packing import pack
from kbit_inductor.quantizers import Format, Statistics, TunedGrids, codebook, distill, gptq
from kbit_inductor.testing.strategies import SEEDS, normal
from kbit_inductor.weights.substitution import substituted

OPTIONS = {"bits": 2, "group_size": 16, "quantizer": "distill", "min_elements": 1}
DATA = normal((8, 64, 32), 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40)).eval().requires_grad_(False)


def lost(model, calibration, options):
    """The divergence of the model with the codes of ``calibration``."""
    exact, are_logits = rows_of(model(DATA))
    config = kbit.Config(**options)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    packed = {
        layer.weight: pack(layer.weight, config.for_layer(name), statistics=calibration.layers[name])
        for name, layer in layers.items()
    }
    with substituted(model, packed):
        found, _ = rows_of(model(DATA))
    part, unit = divergence(exact, found, are_logits)
    return float(part / unit)


def test_tuned_grids_lower_the_divergence_of_the_model(model, one_thread_without_grad):
    tuned, plain = (kbit.calibrate(model, DATA.split(2), {**OPTIONS, "quantizer": name}) for name in ("distill", "gptq"))
    assert lost(model, tuned, OPTIONS) < lost(model, plain, {**OPTIONS, "quantizer": "gptq"})
    for name, statistics in tuned.layers.items():
        weight, form = model.get_submodule(name).weight, kbit.LayerConfig(2, 16).format(32 if name == "0" else 48)
        assert torch.equal(distill(weight, form, statistics).codes, gptq(weight, form, statistics).codes)


def test_the_divergence_of_logits_is_a_mean_over_rows():
    exact, found = normal((5, 7), 0), normal((5, 7), 1)
    part, unit = divergence(exact, found, True)
    wanted = nn.functional.kl_div(found.log_softmax(-1), exact.log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close((part / unit).float(), wanted)
    assert float(divergence(exact, exact, True)[0]) == 0 and float(divergence(exact, exact, False)[0]) == 0


def test_parameters_of_the_model_are_left_alone(model):
    model.requires_grad_()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    kbit.calibrate(model, DATA[:2].split(1), OPTIONS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(now, was) for now, was in zip(model.parameters(), before, strict=True))


def test_the_same_grids_for_any_number_of_threads(model):
    found = [with_threads(n, kbit.calibrate, model, DATA[:4].split(2), OPTIONS).layers for n in (1, 2)]
    for name, statistics in found[0].items():
        assert torch.equal(statistics.learned.quantized.scale, found[1][name].learned.quantized.scale)
        assert torch.equal(statistics.learned.quantized.offset, found[1][name].learned.quantized.offset)


@given(
    bits=st.integers(1, 8), columns=st.integers(1, 70), group=st.sampled_from([1, 16, 64]), symmetric=st.booleans(),
    book=st.sampled_from(["uniform", "normal"]), seed=SEEDS,
)  # fmt: skip
def test_nothing_tuned_is_gptq(bits, columns, group, symmetric, book, seed):
    weight, form = normal((3, columns), seed), Format(bits, min(group, columns), symmetric, codebook(book, bits))
    statistics = Statistics(torch.ones(columns), torch.eye(columns), 100)
    tuned, begun = TunedGrids(weight, form, statistics), gptq(weight, form, statistics)
    found = tuned.learned([variable.detach() for variable in tuned.variables]).of(weight, form)
    assert found is not None
    assert torch.equal(found.codes, begun.codes) and torch.equal(found.scale, begun.scale)
    assert symmetric or torch.equal(found.offset, begun.offset)


def test_the_values_that_are_tuned_with_are_those_of_the_codes():
    weight, form = normal((4, 40), 0), Format(3, 16)
    tuned = TunedGrids(weight, form, None)
    variables = [0.1 * normal(tuple(variable.shape), 1) for variable in tuned.variables]
    learned = tuned.learned(variables)
    config = kbit.LayerConfig(3, 16, quantizer="distill")
    packed = pack(weight, config, statistics=Statistics(torch.ones(40), learned=learned))
    # The reference multiplies in another order: an ulp or two of float32 of the largest value.
    torch.testing.assert_close(packed.dequantize(), tuned.dequantized(), rtol=0, atol=8 * 2.0**-23 * float(weight.abs().max()))
    assert packed.error == pytest.approx(learned.quantized.error)


def test_grids_of_another_format_are_not_used(caplog):
    weight, form = normal((4, 40), 0), Format(3, 16)
    tuned = TunedGrids(weight, form, None)
    statistics = Statistics(torch.ones(40), torch.eye(40), 100, tuned.learned(tuned.variables))
    form = dataclasses.replace(form, bits=4)
    with caplog.at_level(logging.WARNING, logger="kbit_inductor"):
        found = distill(weight, form, statistics)
    assert "distill" in caplog.text and torch.equal(found.codes, gptq(weight, form, statistics).codes)


def test_what_was_tuned_is_found_again(model, tmp_path, monkeypatch):
    wanted = kbit.calibrate(model, DATA[:2].split(1), OPTIONS, resume=tmp_path)
    monkeypatch.setattr(distillation, "_learn", lambda *arguments: pytest.fail("tuned again"))
    found = kbit.calibrate(model, DATA[:2].split(1), OPTIONS, resume=tmp_path)
    for name, statistics in wanted.layers.items():
        assert torch.equal(found.layers[name].learned.quantized.scale, statistics.learned.quantized.scale)


def test_a_head_is_tuned_at_its_own_bits():
    model = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40)).eval()
    calibration = kbit.calibrate(model, torch.arange(40)[None], OPTIONS)
    assert [calibration.layers[name].learned.format.bits for name in ("1", "2")] == [2, 6]
