"""Codes that are learned block by block, and what becomes of them."""

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
from kbit_inductor.calibrating import reconstruct
from kbit_inductor.packing import pack
from kbit_inductor.quantizers import Format, LearnedRounding, Statistics, autoround, clip, codebook, gptq
from kbit_inductor.testing.strategies import SEEDS, normal

OPTIONS = {"bits": 2, "quantizer": "autoround", "group_size": 16}


class Block(nn.Module):
    """A residual branch of two layers, called as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x, scale=1.0):
        return (x + scale * self.down(torch.relu(self.up(x))),)


class Model(nn.Module):
    """Two blocks and a head, which is in none."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 40)

    def forward(self, x):
        for block in self.blocks:
            (x,) = block(x, scale=0.5)
        return self.head(x)


@pytest.fixture(autouse=True, scope="module")
def _few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "STEPS", 40)
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


DATA = normal((8, 64, 32), 1)


def error(model, calibration, options):
    """The squared error of the last block with the codes of ``calibration``."""
    exact, floats = model(DATA), {name: parameter.clone() for name, parameter in model.state_dict().items()}
    quantized = Model()
    quantized.load_state_dict(floats)
    for name, module in quantized.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = pack(
                module.weight.data, kbit.Config(**options).for_layer(name), statistics=calibration.layers[name]
            ).dequantize()
    return float((quantized(DATA) - exact).square().sum())


def test_learned_codes_lower_the_error_of_the_output(model, one_thread_without_grad):
    calibration = kbit.calibrate(model, DATA.split(2), OPTIONS)
    assert {name for name, each in calibration.layers.items() if each.learned} == {
        "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down",
    }  # fmt: skip
    without = kbit.calibrate(model, DATA.split(2), {**OPTIONS, "quantizer": "clip"})
    assert error(model, calibration, OPTIONS) < error(model, without, {**OPTIONS, "quantizer": "clip"})


def test_the_same_codes_each_time_and_for_any_number_of_threads(model):
    found = [with_threads(n, kbit.calibrate, model, DATA.split(4), OPTIONS).layers for n in (1, 1, 2)]
    for name, statistics in found[0].items():
        if statistics.learned is None:
            continue
        assert torch.equal(statistics.learned.planes, found[1][name].learned.planes)
        assert torch.equal(statistics.learned.planes, found[2][name].learned.planes)


@given(
    bits=st.integers(1, 8), columns=st.integers(1, 70), group=st.sampled_from([1, 16, 64]), symmetric=st.booleans(),
    book=st.sampled_from(["uniform", "normal"]), seed=SEEDS,
)  # fmt: skip
def test_nothing_learned_is_the_clip_search(bits, columns, group, symmetric, book, seed):
    weight, form = normal((3, columns), seed), Format(bits, min(group, columns), symmetric, codebook(book, bits))
    rounding = LearnedRounding(weight, form, None)
    begun, found = clip(weight, form), rounding.learned(rounding.snapshot()).of(weight, form)
    assert found is not None
    assert torch.equal(found.scale, begun.scale) and (symmetric or torch.equal(found.offset, begun.offset))
    # A value half way between two levels may go to either.
    assert found.error == pytest.approx(begun.error, rel=1e-4, abs=1e-9)


def test_the_values_that_are_learned_with_are_those_of_the_codes():
    weight, form = normal((4, 40), 0), Format(3, 16)
    rounding = LearnedRounding(weight, form, None)
    gradients = [normal(tuple(variable.shape), 1) for variable in rounding.variables]
    for _ in range(5):
        rounding.step(gradients, 0.05)
    learned = rounding.learned(rounding.snapshot())
    statistics = Statistics(torch.ones(40), learned=learned)
    packed = pack(weight, kbit.LayerConfig(3, 16, quantizer="autoround"), statistics=statistics)
    # The reference multiplies in another order: an ulp or two of float32 of the largest value.
    torch.testing.assert_close(packed.dequantize(), rounding.dequantized(), rtol=0, atol=4 * 2.0**-23 * float(weight.abs().max()))
    assert packed.error == pytest.approx(learned.quantized.error)


@pytest.mark.parametrize("change", ["format", "weight"])
def test_what_was_learned_for_something_else_is_not_used(change, caplog):
    weight, form = normal((4, 40), 0), Format(3, 16)
    rounding = LearnedRounding(weight, form, None)
    statistics = Statistics(torch.ones(40), torch.eye(40), 100, rounding.learned(rounding.snapshot()))
    if change == "format":
        form = dataclasses.replace(form, bits=4)
    else:
        weight = weight.roll(1, 0)
    with caplog.at_level(logging.WARNING, logger="kbit_inductor"):
        found = autoround(weight, form, statistics)
    assert "autoround" in caplog.text and "gptq" in caplog.text
    assert torch.equal(found.codes, gptq(weight, form, statistics).codes)


def test_a_block_learns_on_what_those_before_it_have_left(model, monkeypatch, one_thread_without_grad):
    learn, seen = reconstruct._learn, []
    monkeypatch.setattr(reconstruct, "_learn", lambda *arguments: seen.append(arguments[2][0]) or learn(*arguments))
    exact = model.blocks[0](DATA, scale=0.5)[0]
    target = model.blocks[1](exact, scale=0.5)[0]
    calibration = kbit.calibrate(model, DATA, OPTIONS)
    assert torch.equal(seen[1].output, target) and seen[1].keywords == {"scale": 0.5}
    for name in ("up", "down"):
        layer = getattr(model.blocks[0], name)
        packed = pack(layer.weight, kbit.LayerConfig(**OPTIONS), statistics=calibration.layers[f"blocks.0.{name}"])
        layer.weight.data = packed.dequantize()
    assert torch.equal(seen[1].arguments[0], model.blocks[0](DATA, scale=0.5)[0])
    assert not torch.equal(seen[1].arguments[0], exact)


def test_an_iterator_of_data_is_run_more_than_once(model):
    found = kbit.calibrate(model, iter(DATA.split(4)), OPTIONS)
    assert found.layers["blocks.1.down"].learned is not None


def test_a_block_that_is_passed_by_is_named(model, caplog):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Linear(32, 32)), nn.Identity()])

        def forward(self, x):
            return self.parts[0][0](x)

    with caplog.at_level(logging.WARNING, logger="kbit_inductor"):
        found = kbit.calibrate(Around(), DATA[0], OPTIONS)
    assert found.layers["parts.0.0"].learned is None and "never called" in caplog.text


def test_bits_that_no_plan_has_chosen_are_not_learned(model):
    options = {**OPTIONS, "bits": "auto", "average_bits": 3}
    assert not any(each.learned for each in kbit.calibrate(model, DATA, options).layers.values())


def test_a_quantized_model_has_the_learned_codes(model):
    calibration = kbit.calibrate(model, DATA.split(4), OPTIONS)
    wanted = pack(model.blocks[0].up.weight, kbit.LayerConfig(**OPTIONS), statistics=calibration.layers["blocks.0.up"])
    kbit.quantize_(model, OPTIONS, calibration)
    assert torch.equal(model.blocks[0].up.weight.dequantize(), wanted.dequantize())


def test_what_was_interrupted_goes_on(model, tmp_path, monkeypatch):
    wanted = kbit.calibrate(model, DATA.split(4), OPTIONS)
    learn, counts = reconstruct._learn, []

    def interrupted(*arguments):
        if counts:
            raise KeyboardInterrupt
        counts.append(1)
        return learn(*arguments)

    monkeypatch.setattr(reconstruct, "_learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kbit.calibrate(model, DATA.split(4), OPTIONS, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    rest = []
    monkeypatch.setattr(reconstruct, "_learn", lambda *arguments: rest.append(1) or learn(*arguments))
    found = kbit.calibrate(model, DATA.split(4), OPTIONS, resume=tmp_path)
    assert len(rest) == 1
    for name, statistics in wanted.layers.items():
        if statistics.learned is not None:
            assert torch.equal(found.layers[name].learned.planes, statistics.learned.planes)
            assert torch.equal(found.layers[name].learned.quantized.scale, statistics.learned.quantized.scale)
    rest.clear()
    kbit.calibrate(model, DATA.split(4), {**OPTIONS, "bits": 3}, resume=tmp_path)
    assert len(rest) == 2  # other bits, other codes


def test_a_damaged_file_of_an_interrupted_run_is_named(model, tmp_path):
    kbit.calibrate(model, DATA[:1], OPTIONS, resume=tmp_path)
    first = min(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(kbit.CorruptModelError, match=first.name):
        kbit.calibrate(model, DATA[:1], OPTIONS, resume=tmp_path)


def test_layers_that_share_a_weight_are_not_learned(model):
    model.blocks[1].up.weight = model.blocks[0].up.weight
    found = kbit.calibrate(model, DATA[:1], OPTIONS).layers
    assert {name for name, each in found.items() if each.learned} == {"blocks.0.down", "blocks.1.down"}
