"""Float weights back into a model that was released."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from kbit_inductor.errors import ReleasedWeightError
from kbit_inductor.weights.release import give_memory, is_released
from kbit_inductor.weights.store import STORE
from kbit_inductor.weights.views import Strides, covers


@torch.no_grad()
def restore_(model: nn.Module) -> nn.Module:
    """Fill every float weight of ``model`` that ``release_weights=True`` has freed with its dequantized values, and return it.

    The packed forms stay valid: compiled calls give what they gave before.

    A weight that is packed more than once is restored from the form with the most bits.

    Raises:
        ReleasedWeightError: the packed forms do not hold all of a weight.
    """
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if not is_released(weight):
            continue
        forms = STORE.packed_forms(weight)
        if not covers((view for view, _ in forms), dataclasses.replace(Strides.of(weight), offset=0)):
            raise ReleasedWeightError(f"{name!r} cannot be restored: only parts of it are packed; load its values instead")
        give_memory(weight)
        for view, packed in sorted(forms, key=lambda form: form[1].config.bits):
            view.assign(weight.data, packed.dequantize())
        STORE.accept(weight)
    return model
