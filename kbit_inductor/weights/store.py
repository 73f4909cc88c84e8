"""The packed weights of this process, one copy of each, bound to parameters by weak references.

A graph names no weight: ``for layer in layers: layer.compile(backend="kbit")`` calls one graph with every layer's weights, and a
parameter may be changed between two calls. So each call looks up what it needs here, by the identity of the parameter, and a
parameter that has changed since it was packed is packed again. How a change is seen: another ``Parameter`` object has another
identity; in-place operations raise ``_version``; ``p.data = …`` gives the parameter another storage object, and holding that object
weakly keeps its address from being used again. What cannot be seen: ``p.data.mul_(…)``, and in-place changes to weights created in
inference mode, since torch counts no versions there.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from kbit_inductor._compat import StorageWeakRef, no_modes, storage_id
from kbit_inductor.calibration import Calibration, lacking
from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import ReleasedWeightError
from kbit_inductor.logs import logger
from kbit_inductor.packing import PackedWeight, pack
from kbit_inductor.progress import Progress
from kbit_inductor.quantizers import Statistics
from kbit_inductor.weights import addresses
from kbit_inductor.weights.derivation import Derivation
from kbit_inductor.weights.release import Owners, is_released, release
from kbit_inductor.weights.views import WeightView

log = logger("pack")
REPACKS_BEFORE_WARNING = 3
Layout = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass(frozen=True, eq=False)
class Form:
    """Which part of a weight is packed, and how. Made by :func:`form`, so that equal forms are one object: every call looks up a
    form for each of its weights, and identity is quick to hash."""

    view: WeightView
    config: LayerConfig
    layout: str
    calibration: object | None = None
    derived: str | None = None


@functools.cache
def form(view: WeightView, config: LayerConfig, layout: str, calibration: object | None = None, derived: str | None = None) -> Form:
    """The one form of this view, config and layout, and keys of a calibration and of a derivation."""
    return Form(view, config, layout, calibration, derived)


@dataclass(frozen=True)
class Slot:
    """A packed weight that a graph needs: which argument it comes from, which part of it, how it is stored, what is known of
    its inputs, and how it is computed from arguments where it is none itself."""

    argument: int
    name: str
    form: Form
    may_release: bool = False
    calibration: Calibration | None = None
    derivation: Derivation | None = None

    @property
    def sources(self) -> tuple[int, ...]:
        """The arguments that it comes from."""
        return (self.argument,) if self.derivation is None else self.derivation.sources

    def matrix(self, arguments: Sequence[Any]) -> Tensor:
        """What is packed of ``arguments``, in float."""
        derivation = self.derivation
        return self.form.view.apply(arguments[self.argument].detach() if derivation is None else derivation.compute(arguments))

    def pack(self, arguments: Sequence[Any]) -> PackedWeight:
        """Its weight among ``arguments``, packed anew."""
        matrix, grid = self.matrix(arguments), None if self.derivation is None else self.derivation.grid
        given = None if grid is None else grid.pack(matrix, arguments, self.form.config, self.name, self.form.layout)
        if given is not None:
            return given
        statistics = self._statistics(arguments[self.argument])
        return pack(matrix, self.form.config, self.name, self.form.layout, statistics)

    def lacks(self, weight: Tensor) -> list[str]:
        """What has to be done without that is made use of, statistics of the inputs; nothing when all is there."""
        return list(lacking(self.form.config, self._statistics(weight)))

    def _statistics(self, weight: Tensor) -> Statistics | None:
        return None if self.calibration is None else self.calibration.of(weight, self.form.view.columns(weight))


@dataclass(frozen=True)
class State:
    """A parameter as it was at one time: its count of changes (inference tensors have none), its storage and layout."""

    parameter: weakref.ref[Tensor]
    version: int | None
    storage: StorageWeakRef
    layout: Layout

    @classmethod
    def of(cls, weight: Tensor, parameter: weakref.ref[Tensor] | None = None) -> State:
        """The state of ``weight`` now, with ``parameter`` as the reference to it."""
        version = None if weight.is_inference() else weight._version
        layout = (weight.shape, weight.stride(), int(weight.storage_offset()))
        return cls(parameter or weakref.ref(weight), version, StorageWeakRef(weight.untyped_storage()), layout)

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the parameter and unchanged since."""
        return (
            self.parameter() is weight
            and (self.version is None or self.version == weight._version)
            and self.storage.cdata == storage_id(weight)
            and self.layout == (weight.shape, weight.stride(), weight.storage_offset())
        )


@dataclass
class Entry:
    """What was packed from one parameter, and the state the parameter was in; ``stale`` is of the state before.

    ``sources`` are the states of all that a form was computed from.
    """

    state: State
    packed: dict[Form, PackedWeight] = field(default_factory=dict)
    sources: dict[Form, tuple[State, ...]] = field(default_factory=dict)
    repacks: int = 0
    stale: dict[Form, PackedWeight] = field(default_factory=dict)

    def find(self, slot: Slot, arguments: Sequence[Any]) -> PackedWeight | None:
        """The form that ``slot`` asks for, if it is of ``arguments`` as they are now."""
        packed = self.packed.get(slot.form)
        if packed is None or not self.state.is_of(arguments[slot.argument]):
            return None
        states = self.sources.get(slot.form, ())
        return packed if all(state.is_of(arguments[i]) for state, i in zip(states, slot.sources, strict=False)) else None


class PackedWeights:
    """Packed weights by parameter."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._lock = threading.RLock()
        self._told_frozen = WeakIdKeyDictionary()
        self._owners = Owners()

    def renew_lock(self) -> None:
        """Forget who holds the lock: the child of a fork may inherit it held by a thread that it does not have."""
        self._lock = threading.RLock()

    def find(self, arguments: Sequence[Any], slot: Slot) -> PackedWeight | None:
        """The packed form of the weight of ``slot`` among ``arguments`` as they are now, or None."""
        entry = self._entries.get(id(arguments[slot.argument]))
        return None if entry is None else entry.find(slot, arguments)

    def packed(self, arguments: Sequence[Tensor], slots: Sequence[Slot]) -> list[PackedWeight]:
        """The packed weights of all ``slots`` in order; what is missing or has changed is packed."""
        found = [self.find(arguments, slot) for slot in slots]
        if None in found:
            found = self._pack_missing(arguments, slots)
        return [packed for packed in found if packed is not None]

    def _pack_missing(self, arguments: Sequence[Tensor], slots: Sequence[Slot]) -> list[PackedWeight | None]:
        with self._lock, Progress(len(slots), "packing weights") as progress:
            packed: list[PackedWeight | None] = []
            for slot in slots:
                packed.append(self.pack(arguments, slot))
                progress.advance(slot.name)
            releasable = {arguments[slot.argument]: slot.name for slot in slots if slot.may_release}
            for weight in release(releasable, self._owners):
                self.accept(weight)
            return packed

    def pack(self, arguments: Sequence[Any], slot: Slot) -> PackedWeight:
        """The packed form of the weight of ``slot`` among ``arguments`` as they are now.

        Raises:
            ReleasedWeightError: the floats it would be packed from were freed.
        """
        with self._lock:
            found = self.find(arguments, slot)
            if found is not None:
                return found
            if any(is_released(arguments[position]) for position in slot.sources):
                raise ReleasedWeightError(
                    f"layer {slot.name!r} needs another packed form ({slot.form.config}), but its float weight was freed by "
                    "release_weights=True; load the weights again first, or compile without release_weights"
                )
            entry = self._current_entry(arguments[slot.argument], slot)
            start = time.perf_counter()
            with no_modes():
                packed = addresses.into(entry.stale.pop(slot.form, entry.packed.get(slot.form)), slot.pack(arguments))
            entry.packed[slot.form] = packed
            if slot.derivation is not None:
                entry.sources[slot.form] = tuple(State.of(arguments[position]) for position in slot.sources)
            log.info(
                "packed %s: %d bits, %d bytes, relative error %.3g, %.3f s",
                slot.name, slot.form.config.bits, packed.nbytes, packed.error, time.perf_counter() - start,
            )  # fmt: skip
            return packed

    def _current_entry(self, weight: Tensor, slot: Slot) -> Entry:
        """The entry of ``weight``, begun anew when it is of another tensor or of an earlier state."""
        key = id(weight)
        old = self._entries.get(key)
        if old is not None and old.state.is_of(weight):
            return old
        entry = Entry(State.of(weight, weakref.ref(weight, self._forget(key))))
        if old is not None and old.state.parameter() is weight:
            entry.repacks = old.repacks + 1
            if weight.device.type in addresses.RECORDING:
                entry.stale = {**old.stale, **old.packed}
        repacks = entry.repacks
        self._entries[key] = entry
        if repacks:
            log.info("%s has changed since it was packed; packing it again", slot.name)
        if repacks == REPACKS_BEFORE_WARNING:
            log.warning(
                "%s changed between calls %d times and was packed again each time; if it changes at every call, leave it in "
                "float with skip=[%r]", slot.name, repacks, slot.name,
            )  # fmt: skip
        return entry

    def _forget(self, key: int) -> Callable[[weakref.ref[Tensor]], None]:
        entries = self._entries

        def forget(reference: weakref.ref[Tensor]) -> None:
            entry = entries.get(key)
            if entry is not None and entry.state.parameter is reference:
                del entries[key]

        return forget

    def accept(self, weight: Tensor) -> None:
        """Take the packed forms of ``weight`` for those of its present state: its memory was freed, or filled from them."""
        entry = self._entries[id(weight)]
        entry.state = State.of(weight, entry.state.parameter)

    def packed_forms(self, weight: Tensor) -> list[tuple[WeightView, PackedWeight]]:
        """The matrices of ``weight`` that are packed as it is now; not those that are computed from it."""
        entry = self._entries.get(id(weight))
        if entry is None or not entry.state.is_of(weight):
            return []
        return [(packed_form.view, packed) for packed_form, packed in entry.packed.items() if packed_form.derived is None]

    def newly_frozen(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The names of those of ``weights`` that require grad, which they will not get, and were not named before."""
        names = [name for name, weight in weights.items() if weight.requires_grad and weight not in self._told_frozen]
        self._told_frozen.update((weights[name], True) for name in names)
        return names

    def nbytes(self) -> int:
        """Bytes of all packed weights that are alive, those to be packed again included."""
        entries = list(self._entries.values())
        return sum(packed.nbytes for entry in entries for packed in (*entry.packed.values(), *entry.stale.values()))


STORE = PackedWeights()
"""The store of this process. Recompiles, and graphs that share layers, must find the one copy that exists."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=STORE.renew_lock)
