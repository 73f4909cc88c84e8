"""A model on the values that a method leaves of its matrices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from kbit_inductor.calibration import Calibration
from kbit_inductor.ends import ends_of_model
from quality.methods import Method


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What is rounded, tables and heads among them."""
    return [parameter for parameter in model.parameters() if parameter.dim() == 2]


@contextlib.contextmanager
@torch.no_grad()
def rounded(method: Method, model: nn.Module, calibration: Calibration) -> Iterator[float]:
    """``model`` rounded by ``method`` for as long as somebody looks, and the bits per weight that are stored."""
    weights, ends, nbytes = matrices(model), ends_of_model(model), 0
    originals = {weight: weight.data for weight in weights}
    try:
        for weight, original in originals.items():
            rounding = method.at_ends if method.at_ends is not None and weight in ends else method.apply
            weight.data, stored = rounding(original, calibration.of(weight, weight.size(1)))
            nbytes += stored
        yield 8 * nbytes / sum(weight.numel() for weight in weights)
    finally:
        for weight, original in originals.items():
            weight.data = original
