"""Packed weights hold the whole of each row, where their quantizer alone would leave them too small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kbit_inductor as kbit
from kbit_inductor.packing import pack
from kbit_inductor.quantizers import Format, Statistics, clip, gptq
from kbit_inductor.quantizers.learned import on_grid
from kbit_inductor.quantizers.stretch import LEAST_SHARE, NEGLIGIBLE, stretched
from kbit_inductor.testing.strategies import SEEDS, normal

HALF = 2.0**-11  # relative error of a rounding to float16


def share(held, weight, metric):
    return ((held @ metric) * weight).sum(1) / ((weight @ metric) * weight).sum(1)


@given(st.integers(2, 4), st.sampled_from([16, 50]), st.booleans(), st.sampled_from(["nothing", "squares", "hessian"]), SEEDS)
def test_each_row_is_held_whole(bits, group, symmetric, known, seed):
    weight, x = normal((24, 50), seed), normal((200, 50), seed + 1) * torch.linspace(0.5, 2, 50)
    hessian = x.t() @ x / len(x)
    told = {
        "nothing": None,
        "squares": Statistics(hessian.diagonal().clone()),
        "hessian": Statistics(hessian.diagonal().clone(), hessian, 200),
    }
    metric = {"nothing": torch.eye(50), "squares": hessian.diagonal().diag(), "hessian": hessian}[known]
    options = kbit.LayerConfig(bits, group, symmetric, quantizer="gptq" if known == "hessian" else "clip")
    alone = (gptq if known == "hessian" else clip)(weight, options.format(50), told[known])
    packed = pack(weight, options, statistics=told[known])
    values = packed.dequantize()
    format = options.format(50)
    begun = share(on_grid(alone, format) * alone.global_scale, weight, metric)  # of outputs that were compensated it may be above 1
    # A scale and an offset are rounded each, of grids that are a few times as wide as the values.
    torch.testing.assert_close(share(values, weight, metric), begun.clamp(min=1), rtol=0, atol=8 * HALF)
    assert packed.error == pytest.approx(float((values - weight).square().sum() / weight.square().sum()), rel=1e-4)
    if known == "nothing":
        assert packed.error >= alone.error * (1 - 1e-6)


def test_what_is_held_whole_already_stays():
    weight = torch.randint(0, 4, (8, 32)) * 0.25 - 0.5
    for form in (Format(2, 32), Format(8, 32)):
        found = clip(weight, form)
        assert found.error <= NEGLIGIBLE and stretched(weight, found, form) is found
    noise = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    form, rtn = Format(2, 32), kbit.LayerConfig(2, 32, quantizer="rtn")
    assert pack(noise, rtn).error == pytest.approx(kbit.quantizers.rtn(noise, form).error)


def test_rows_of_zeros_and_rows_that_their_codes_miss():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    form = Format(2, 64)
    found = clip(weight, form)
    found.codes[2] = 0
    grown = stretched(weight, found, form)
    assert torch.equal(grown.scale[1], found.scale[1]) and torch.isfinite(grown.scale).all() and torch.isfinite(grown.offset).all()
    assert float((grown.scale[2] / found.scale[2]).max()) <= 1 / LEAST_SHARE * (1 + 2 * HALF)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 1)])
def test_weights_of_few_entries(shape):
    packed = pack(torch.full(shape, 0.3), kbit.LayerConfig(2, 16))
    assert packed.dequantize().shape == shape and packed.error <= NEGLIGIBLE
