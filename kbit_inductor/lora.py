"""Where low-rank adapters (LoRA) on packed weights begin: at the low-rank part of what packing has lost.

With ``W`` the float weight and ``Q`` the values of its codes, ``W - Q`` is approximated by ``B @ A`` of the adapter's rank, so that
training begins nearer to the float model than at ``Q`` (LoftQ: Li et al., 2023). With a calibration the error of each column counts
by the mean square of what it is multiplied with (LQER, Zhang et al., 2024; QERA, Zhang et al., 2024, its approximate form).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.calibration import Calibration
from kbit_inductor.errors import ModelMismatchError
from kbit_inductor.models.modules import PackedLinear, PackedMatrix
from kbit_inductor.quantizers.compensation import low_rank


@torch.no_grad()
def init_lora_(
    model: nn.Module, floats: Mapping[str, Tensor], calibration: Calibration | None = None, *, adapter: str = "default"
) -> nn.Module:
    """Set the adapters that PEFT has put on packed layers of ``model`` to the low-rank part of their error, in place.

    Args:
        model: returned by ``peft.get_peft_model`` on a packed model, LoRA without DoRA.
        floats: the state dict that the model was packed from, by its own names. Values of layers without an adapter are not read.
        calibration: of the float model, by the same names; None to count all columns alike.
        adapter: which one, of several.

    Returns:
        ``model``.

    Raises:
        ModelMismatchError: no packed layer has that adapter, or ``floats`` lacks one of them or has another shape.
    """
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found = list(_adapters(base, adapter))
    if not found:
        raise ModelMismatchError(f"no packed layer has a LoRA adapter {adapter!r}; call peft.get_peft_model on the packed model")
    for name, layer, matrix in found:
        weight = floats.get(f"{name}.weight")
        if weight is None or weight.shape != matrix.shape:
            what = "is missing" if weight is None else f"is {tuple(weight.shape)}, not {tuple(matrix.shape)}"
            raise ModelMismatchError(f"{name}.weight {what} in the floats; give the state dict of the model that was packed")
        statistics = None if calibration is None else calibration.layers.get(name)
        error = weight.to(matrix.device, torch.float32) - matrix.packed.dequantize()
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        left, right = low_rank(error, down.size(0), None if statistics is None else statistics.importance().sqrt())
        scaling = abs(layer.scaling[adapter]) ** 0.5
        up.copy_(left / scaling)
        down.copy_(right / scaling)
    return model


def _adapters(base: nn.Module, adapter: str) -> Iterator[tuple[str, Any, PackedMatrix]]:
    """The name in ``base`` of every packed layer with that adapter, the layer that PEFT has put there, and its weight."""
    for name, layer in base.named_modules():
        packed = getattr(layer, "base_layer", None)
        if isinstance(packed, PackedLinear) and adapter in getattr(layer, "lora_A", ()):
            yield name, layer, packed._modules["weight"]  # type: ignore[misc]
