"""The packed weights that a graph takes, looked up at every call, at a cost that does not show."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import TILED_LAYOUTS
from kbit_inductor.packing import PackedWeight
from kbit_inductor.weights.store import PackedWeights, Slot

Known = list[weakref.ref[PackedWeight]]


class Binding:
    """Finds the operands for ``slots`` in ``store``.

    One number tells whether any weight of a call is another than in an earlier call, or was written to since: the fingerprint,
    which the compiled library takes of all of them at once. Only then are they looked up one by one. Weights are held weakly,
    and a graph that several layers share keeps what it knows of each.
    """

    def __init__(self, store: PackedWeights, slots: tuple[Slot, ...]) -> None:
        self.store = store
        self.slots = slots
        self.arguments = tuple(dict.fromkeys(position for slot in slots for position in slot.sources))
        tiled = bool(slots) and all(slot.form.layout in TILED_LAYOUTS for slot in slots)
        self.fingerprint = torch.ops.kbit.fingerprint.default if tiled else None
        self.has_sides = any(slot.form.config != slot.form.config.without_side for slot in slots)
        self.known: dict[int, Known] = {}

    def operands(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The operands of all slots in order, for the weights among ``arguments`` as they are now."""
        if self.fingerprint is None:
            return _flat(self.store.packed(arguments, self.slots))
        weights = [arguments[i] for i in self.arguments]
        known = self.known.get(self.fingerprint(weights))
        if known is not None:
            packed = [reference() for reference in known]
            if None not in packed:
                return _flat(packed) if self.has_sides else [one.operands[0] for one in packed]  # type: ignore[arg-type, union-attr]
        return _flat(self._look_up(arguments, weights))

    def _look_up(self, arguments: Sequence[Any], weights: list[Tensor]) -> list[PackedWeight]:
        packed = self.store.packed(arguments, self.slots)
        for key, references in list(self.known.items()):  # a copy: other threads add to it
            if any(reference() is None for reference in references):
                self.known.pop(key, None)
        # Packing may have released the weights, so the fingerprint is that of now.
        self.known[self.fingerprint(weights)] = [weakref.ref(one) for one in packed]  # type: ignore[misc]
        return packed


def _flat(packed: list[PackedWeight]) -> list[Tensor]:
    return [operand for one in packed for operand in one.inputs]
