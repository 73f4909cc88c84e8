"""The library's strategies draw what they say, and its checks hold on what they draw."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.packing import pack
from kbit_inductor.testing import assert_equivalent, strategies
from kbit_inductor.testing.strategies import inputs, modules, options, weights


@given(weight=weights(), chosen=options())
def test_every_weight_can_be_packed_with_every_option(weight, chosen):
    config = kbit.LayerConfig(**{name: value for name, value in chosen.items() if name != "min_elements"})
    assert pack(weight, config).dequantize().shape == weight.shape


@given(bits=st.integers(1, 8), data=st.data())
def test_exact_weights_are_exact(bits, data):
    weight = data.draw(weights(st.just(bits), 8, ["exact"]))
    assert torch.equal(pack(weight, kbit.LayerConfig(bits, 8, quantizer="rtn")).dequantize(), weight)


@settings(max_examples=8)
@given(data=st.data(), chosen=options())
def test_random_modules_are_equivalent(data, chosen):
    module, width = data.draw(modules().filter(lambda drawn: any(p.dim() == 2 for p in drawn[0].parameters())))
    x = data.draw(inputs(module, width))
    assert_equivalent(module.eval(), x, chosen, through_inductor=False)


def test_a_module_shrinks_to_what_matters():
    module, width = find(modules(), lambda drawn: any(isinstance(layer, strategies.Gated) for layer in drawn[0]))
    assert (len(module), width) == (1, 1)
    assert isinstance(module[0], strategies.Gated) and isinstance(module[0].down, nn.Linear)


def test_without_hypothesis_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(kbit.MissingPackageError, match=r"pip install kbit-inductor\[testing\]"):
        importlib.reload(strategies)
