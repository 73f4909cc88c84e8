"""Float weights back into a model that was released."""

from __future__ import annotations

import torch
from torch import nn

from kbit_inductor.errors import ReleasedWeightError
from kbit_inductor.release import give_memory, is_released
from kbit_inductor.store import STORE


@torch.no_grad()
def restore_(model: nn.Module) -> nn.Module:
    """Fill every float weight of ``model`` that ``release_weights=True`` has freed with its dequantized values, and return it.

    Raises:
        ReleasedWeightError: of a weight, only parts were packed, so that the rest is lost.
    """
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if not is_released(weight):
            continue
        forms = STORE.packed_forms(weight)
        if sum(packed.operands[0].size(1) * packed.columns for _, packed in forms) < weight.numel():
            raise ReleasedWeightError(f"{name!r} cannot be restored: only parts of it were packed; load its values instead")
        give_memory(weight)
        for view, packed in forms:
            view.assign(weight.data, packed.dequantize())
        weight.add_(0)  # raises the version, so that the next compiled call packs what is here now
    return model
