"""Statistics of a model's layers, the quantizers that use them, and their way into a compiled model."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threads import with_threads
from torch import nn
from torch.utils.data import DataLoader

import kbit_inductor as kbit
from kbit_inductor.calibration import warn_lacking
from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import pack_codes
from kbit_inductor.packing import pack
from kbit_inductor.quantizers import Format, Statistics, clip, codebook, gptq
from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.testing.strategies import SEEDS, normal

GPTQ = kbit.Config(quantizer="gptq")


class Model(nn.Module):
    """An embedding, two layers that use it, and one that nothing calls."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 48)
        self.first, self.second, self.unused = nn.Linear(48, 64), nn.Linear(64, 40), nn.Linear(64, 64)

    def forward(self, ids, attention_mask=None):
        return self.second(torch.relu(self.first(self.table(ids))))


IDS = torch.arange(24).view(4, 6) % 32


def tokenizer(text, return_tensors, truncation, max_length):
    ids = torch.tensor([[int(word) for word in text.split()]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Keywords(nn.Module):
    """Called with what a tokenizer gives."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask)


def assert_same(found, wanted):
    for name, statistics in wanted.layers.items():
        assert found.layers[name].rows == statistics.rows
        torch.testing.assert_close(found.layers[name].mean_square, statistics.mean_square)


def test_moments_are_those_of_the_inputs():
    model = Model()
    calibration = kbit.calibrate(model, IDS, GPTQ)
    inputs = {"first": model.table(IDS).flatten(0, 1), "second": torch.relu(model.first(model.table(IDS))).flatten(0, 1)}
    assert set(calibration.layers) == set(inputs)
    for name, x in inputs.items():
        statistics = calibration.layers[name]
        assert statistics.rows == 24
        torch.testing.assert_close(statistics.mean_square, x.square().mean(0))
        torch.testing.assert_close(statistics.hessian, x.t() @ x / 24)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_hessian_is_kept_only_where_it_is_asked_for():
    calibration = kbit.calibrate(Model(), IDS, {"overrides": {"second": {"quantizer": "gptq"}}, "skip": ["unused"]})
    assert calibration.layers["first"].hessian is None and calibration.layers["second"].hessian is not None


@pytest.mark.parametrize(
    "data",
    [
        [IDS[:1], IDS[1:]],
        [{"ids": IDS[:2]}, {"ids": IDS[2:]}],
        [(IDS, None)],
        IDS.split(1),
        DataLoader(IDS, batch_size=2),
        (row[None] for row in IDS),
    ],
    ids=["tensors", "mappings", "arguments", "tuple", "DataLoader", "generator"],
)
def test_every_form_of_data_gives_the_same(data):
    model = Model()
    assert_same(kbit.calibrate(model, data), kbit.calibrate(model, IDS))


def test_texts_go_through_the_tokenizer():
    model = Model()
    texts = [" ".join(map(str, row.tolist())) for row in IDS]
    found = kbit.calibrate(Keywords(model), texts, tokenizer=tokenizer)
    wanted = kbit.calibrate(model, IDS)
    assert {name.removeprefix("model.") for name in found.layers} == set(wanted.layers)
    torch.testing.assert_close(found.layers["model.first"].mean_square, wanted.layers["first"].mean_square)
    with pytest.raises(kbit.InvalidOptionError, match="tokenizer="):
        kbit.calibrate(model, texts)


def test_of_a_tied_table_every_column_counts():
    model = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 40, bias=False))
    free = kbit.calibrate(model, IDS, GPTQ).layers["1"]
    model[1].weight = model[0].weight
    tied = kbit.calibrate(model, IDS, GPTQ).layers["1"]
    mean = free.mean_square.mean()
    torch.testing.assert_close(tied.mean_square, (free.mean_square + mean) / 2)
    torch.testing.assert_close(tied.hessian, (free.hessian + mean * torch.eye(16)) / 2)


@pytest.mark.parametrize("data", [[], iter(()), IDS[:0], [IDS[:0]]])
def test_no_data_is_an_error(data):
    with pytest.raises(kbit.EmptyCalibrationError, match="at least one"):
        kbit.calibrate(Model(), data)


def test_a_layer_that_is_given_nan_is_named():
    model = Model()
    model.first.bias.data[3] = float("nan")
    with pytest.raises(kbit.NonFiniteActivationError, match="'second'"):
        kbit.calibrate(model, IDS)
    assert not model.second._forward_pre_hooks


def test_a_layer_that_is_never_reached_is_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="kbit_inductor"):
        kbit.calibrate(Model(), IDS)
    assert "never reached 1 of 3 layers (unused, …)" in caplog.text


def test_the_option_takes_nothing_else():
    with pytest.raises(kbit.InvalidOptionError, match=r"is a list.*kbit_inductor\.calibrate"):
        kbit.Config(calibration=[IDS])


# --- gptq ------------------------------------------------------------------------------------------------------------


def correlated(columns, seed, rows=256):
    """Statistics of inputs that a few directions explain for the most part, as in language models."""
    x = normal((rows, 8), seed) @ normal((8, columns), seed + 1) + 0.3 * normal((rows, columns), seed + 2)
    return Statistics(x.square().mean(0), x.t() @ x / rows, rows)


def output_error(weight, quantized, form, statistics):
    planes, levels = pack_codes(quantized.codes, form.bits), form.levels.table(weight.device)
    grids = quantized.scale, quantized.offset, quantized.global_scale
    error = (reference.dequantize(planes, *grids, weight.size(1), form.group_size, torch.float64, levels) - weight).double()
    return float(((error @ statistics.hessian.double()) * error).sum())


@given(
    bits=st.integers(1, 8), group=st.sampled_from([16, 50, 200]), symmetric=st.booleans(), seed=SEEDS,
    book=st.sampled_from(["uniform", "normal"]),
)  # fmt: skip
def test_gptq_lowers_the_error_of_the_output(bits, group, symmetric, seed, book):
    weight, statistics, form = normal((12, 100), seed), correlated(100, seed), Format(bits, group, symmetric, codebook(book, bits))
    found = gptq(weight, form, statistics)
    assert found.codes.shape == weight.shape and (found.offset is None) == symmetric
    # One bit moves values so far that what is to come cannot always make it good; from 2 bits on the gain is large.
    limit = 1.0 if bits == 1 else 0.7
    plain = clip(weight, form, statistics)
    assert output_error(weight, found, form, statistics) < limit * output_error(weight, plain, form, statistics)


@given(bits=st.integers(1, 8), seed=SEEDS, step=st.integers(-20, 8))
def test_gptq_leaves_a_weight_on_a_grid_as_it_is(bits, seed, step):
    codes = torch.randint(0, 2**bits, (5, 3, 32), generator=torch.Generator().manual_seed(seed))
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    weight = torch.ldexp(codes.float() - 3, torch.tensor(step)).view(5, 96)
    found = pack(weight, kbit.LayerConfig(bits, 32, quantizer="gptq"), statistics=correlated(96, seed))
    assert found.error == 0 and torch.equal(found.dequantize(), weight)


def test_a_hessian_that_cannot_be_factored_falls_back_to_clip_with_a_warning(caplog):
    weight, form = normal((8, 64), 0), Format(4, 32)
    indefinite = Statistics(torch.ones(64), torch.ones(64, 64) - 5 * torch.eye(64).flip(0), 7)
    with caplog.at_level(logging.WARNING, logger="kbit_inductor"):
        found = gptq(weight, form, indefinite)
    assert "7 rows of calibration" in caplog.text and "'clip'" in caplog.text
    assert torch.equal(found.codes, clip(weight, form, indefinite).codes)


def test_gptq_does_not_depend_on_the_number_of_threads():
    arguments = normal((300, 257), 0), Format(3, 64), correlated(257, 0)
    one, many = with_threads(1, gptq, *arguments), with_threads(2, gptq, *arguments)
    assert torch.equal(one.codes, many.codes) and torch.equal(one.scale, many.scale) and one.error == many.error


# --- compiled models -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return torch.relu(self.fc(x)) + 0.1 * x


def data(rows, seed=0):
    """Inputs of which one column in eight is large: always the same ones."""
    return normal((rows, 64), seed) * torch.where(torch.arange(64) % 8 == 0, 10.0, 0.3)


def test_a_quantizer_without_the_hessian_it_is_made_for_is_told(one_thread_without_grad, caplog):
    model, options = Block().eval(), {"quantizer": "gptq", "min_elements": 0}
    (layer,) = kbit.explain(model, data(4), config=options).layers
    assert layer.matched and "Hessian" in layer.reasons[0] and "'calibration'" in layer.reasons[0]
    warn_lacking.cache_clear()
    with caplog.at_level(logging.WARNING, logger="kbit_inductor"):
        for block in (model, Block().eval()):
            torch.compile(block, backend="kbit", options=options)(data(4))
    assert caplog.text.count("Hessian") == 1
    calibration = kbit.calibrate(model, data(64), options)
    (layer,) = kbit.explain(model, data(4), config={**options, "calibration": calibration}).layers
    assert layer.matched and not layer.reasons


@pytest.mark.parametrize("quantizer", ["clip", "gptq"])
def test_each_layer_is_packed_by_its_own_statistics(one_thread_without_grad, quantizer):
    model = nn.Sequential(Block(), Block())
    options = {"bits": 2, "quantizer": quantizer}
    calibration = kbit.calibrate(model, data(512), options)
    config = kbit.Config(**options, calibration=calibration)
    for block in model:
        block.compile(backend="kbit", options=config)  # one graph for both
    model(data(4))
    twin = dequantized_copy(model)
    for index, block in enumerate(model):
        wanted = pack(block.fc.weight, config.for_layer("fc"), statistics=calibration.layers[f"{index}.fc"])
        assert torch.equal(twin[index].fc.weight, wanted.dequantize())


def test_calibration_lowers_the_error_of_a_compiled_model(one_thread_without_grad):
    model, x = nn.Sequential(Block(), Block(), Block()), data(64, seed=9)
    exact, errors = model(x), []
    for quantizer in (None, "clip", "gptq"):
        options = {"bits": 3, "quantizer": quantizer or "clip"}
        calibration = kbit.calibrate(model, data(512), options) if quantizer else None
        compiled = torch.compile(model, backend="kbit", options={**options, "calibration": calibration})
        errors.append(relative_error(compiled(x), exact))
    assert errors[1] < errors[0] and errors[2] < errors[0]


def test_explain_and_the_compiled_model_agree(one_thread_without_grad):
    model, x = nn.Sequential(Block()), data(4)
    options = {"bits": 2, "calibration": kbit.calibrate(model, data(512))}
    before = kbit.explain(model, x, config=options).layers[0].error
    assert before != kbit.explain(model, x, config={"bits": 2}).layers[0].error
    torch.compile(model, backend="kbit", options=options)(x)
    assert kbit.explain(model, x, config=options).layers[0].error == before
