"""What a compiled model is compared with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kbit_inductor.weights.store import STORE


def dequantized_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers hold what their packed forms stand for.

    Run in eager it is the oracle of the compiled model. The model must have been called compiled before, so that its weights are
    packed; weights that were never packed keep their values.

    Raises:
        LookupError: no weight of ``model`` is packed.
    """
    twin = copy.deepcopy(model)
    originals = [*model.parameters(), *model.buffers()]
    copies = [*twin.parameters(), *twin.buffers()]
    written = 0
    with torch.no_grad():
        for original, copied in zip(originals, copies, strict=True):
            for view, packed in STORE.packed_forms(original):
                view.assign(copied.data, packed.dequantize())
                written += 1
    if not written:
        raise LookupError("no weight of the model is packed; call the compiled model first")
    return twin


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖`` in float64, or the norm of ``actual`` where ``expected`` is zero."""
    exact = expected.detach().double()
    difference = (actual.detach().double() - exact).norm()
    norm = exact.norm()
    return float(difference / norm if norm > 0 else difference)
