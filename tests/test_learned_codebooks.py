"""Levels that are learned for a weight, and levels of one's own as an option."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.packing import pack
from kbit_inductor.quantizers import Format, Statistics, clip, codebook
from kbit_inductor.quantizers.codebooks import as_text, is_codebook, to_bytes
from kbit_inductor.quantizers.kmeans import learn_levels
from kbit_inductor.testing import dequantized_copy, relative_error
from kbit_inductor.testing.strategies import SEEDS, normal


@given(
    bits=st.integers(1, 8), rows=st.integers(0, 3), columns=st.integers(0, 70), group=st.sampled_from([1, 16, 64]),
    symmetric=st.booleans(), spread=st.sampled_from([0.0, 1.0, 1e30]), seed=SEEDS,
)  # fmt: skip
def test_levels_are_a_codebook_and_no_worse_than_those_of_a_gaussian(bits, rows, columns, group, symmetric, spread, seed):
    weight, form = normal((rows, columns), seed) * spread, Format(bits, group, symmetric)
    levels = learn_levels(weight, form)
    assert (levels is None) == (bits in (1, 8))
    if levels is not None:
        assert is_codebook(as_text(levels), bits) and codebook(as_text(levels), bits) == levels
        errors = [clip(weight, Format(bits, group, symmetric, each)).error for each in (levels, codebook("normal", bits))]
        assert errors[0] <= errors[1] * (1 + 1e-4)  # float32 sums of squares


@pytest.mark.parametrize("symmetric", [False, True])
def test_values_of_few_kinds_are_held_nearly_exactly(symmetric):
    kinds = torch.tensor([-1.0, -0.1, 0.3, 1.0])
    weight = kinds[torch.randint(4, (16, 128), generator=torch.Generator().manual_seed(0))]
    weight[:, 0], weight[:, 1] = -1, 1
    form = Format(2, 128, symmetric)
    learned = clip(weight, Format(2, 128, symmetric, learn_levels(weight, form)))
    # Each of the two inner levels is off by at most half a byte of 254 to a range of 2.
    assert learned.error <= (2 / 254 / 2) ** 2 / float(weight.square().mean()) + 1e-6
    assert clip(weight, Format(2, 128, symmetric, codebook("normal", 2))).error > 10 * learned.error


def test_columns_that_count_more_are_held_better():
    kinds = torch.tensor([-1.0, -0.1, 0.3, 1.0])[torch.randint(4, (8, 32), generator=torch.Generator().manual_seed(0))]
    weight = torch.cat([normal((8, 32), 0).clamp(-1, 1), kinds], 1)
    statistics = Statistics(torch.cat([torch.full((32,), 1e-4), torch.ones(32)]))
    form = Format(2, 64)

    def error(levels):
        packed = pack(weight, kbit.LayerConfig(2, codebook=as_text(levels)), statistics=statistics)
        return float(((packed.dequantize() - weight).square() * statistics.mean_square).sum())

    assert error(learn_levels(weight, form, statistics)) < error(learn_levels(weight, form))


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=128), st.integers(2, 7))
def test_bytes_are_distinct_levels_whatever_the_values(values, bits):
    values = sorted((values * 2**bits)[: 2**bits])
    assert is_codebook(as_text(to_bytes(torch.tensor([*values[:-1], 1.5], dtype=torch.float64))), bits)


def test_a_model_computes_with_its_own_levels_and_is_saved_with_them(tmp_path, one_thread_without_grad):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)).eval(), normal((5, 64), 0)
    options = {"bits": 3, "activation_bits": 16, "overrides": {"2": {"bits": 8}}}
    options["overrides"] = kbit.learn_codebooks(model, options)
    assert options["overrides"]["2"] == {"bits": 8} and list(options["overrides"]["0"]) == ["bits", "codebook"]
    report = kbit.explain(model, x, config=options)
    assert report.layer("0").config.levels() == codebook(options["overrides"]["0"]["codebook"], 3)
    assert "3 own levels" in str(report)
    with torch.no_grad():
        compiled = torch.compile(model, backend="kbit", options=options)(x)
    assert relative_error(compiled, dequantized_copy(model)(x)) < 64 * 2.0**-23  # sums of 64 products in another order
    kbit.save(kbit.quantize_(model, options), tmp_path / "saved")
    loaded = kbit.load(tmp_path / "saved", lambda: nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)))
    assert torch.equal(loaded[0].weight.dequantize(), model[0].weight.dequantize())


def test_ends_of_more_bits_do_without_levels_of_fewer():
    config = kbit.Config(bits=2, codebook="0 90 166 255")
    assert config.for_layer("x").levels() == (0, 90, 166, 255) and config.for_layer("x", is_end=True).levels() is None


@pytest.mark.parametrize("levels", ["0 90 166", "0 90 90 255", "90 0 166 255", "0 90 166 256", "-1 0 1 2", "nothing", "", 3])
def test_levels_that_are_none_are_an_error(levels):
    with pytest.raises(kbit.InvalidOptionError, match="codebook"):
        kbit.Config(bits=2, codebook=levels)


def test_bits_that_no_plan_has_chosen_are_an_error():
    with pytest.raises(kbit.InvalidOptionError, match="known"):
        kbit.learn_codebooks(nn.Linear(8, 8), {"bits": "auto", "average_bits": 3})
