"""Kernels of others beside those of :data:`kbit_inductor.lowering.registry.KERNELS`.

A name stands for one kernel for as long as the process lives, and of equally cheap kernels the built-in ones come first, then the
others by name, so nothing depends on the order of imports.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from kbit_inductor.entry_points import load
from kbit_inductor.errors import InvalidKernelError
from kbit_inductor.kernels.layout import TILED_LAYOUTS
from kbit_inductor.lowering import registry
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import Kernel

if TYPE_CHECKING:
    from kbit_inductor.lowering.cost.device import DeviceRecord
    from kbit_inductor.lowering.cost.work import Work

GROUP = "kbit_inductor.kernels"
FAMILIES = ("linear", "embedding", "batched_linear", "grouped_linear")
LAYOUTS = ("planes", "words", *TILED_LAYOUTS)
_by_name: dict[str, Kernel] = {}
_lock = threading.Lock()


def register_kernel(
    name: str,
    suffix: str,
    supports: Callable[[Problem], str | None],
    cost: Callable[[Problem], float],
    layout: str = "planes",
    works: Callable[[Problem, DeviceRecord], Sequence[Work]] | None = None,
    rounds: bool = False,
) -> Kernel:
    """Let a kernel compute products or look-ups of graphs that are compiled from now on, where it can and is the cheapest.

    Another package does the same by an entry point of the group ``kbit_inductor.kernels`` that names a :class:`Kernel`.

    Args:
        name: shown by ``explain``.
        suffix: of its operators, ``kbit::{family}{suffix}``, which must be there (``kbit_inductor.lowering.ops.define``).
        supports: None when it can compute a problem, else the reason why not.
        cost: its time for one row of activations, in bytes that could be read meanwhile.
        layout: of the packed weights that it reads, ``"planes"``, ``"words"``, ``"tiled"`` or ``"vectors"``.
        works: for the cost model, see docs/cost-model.md; by default it is taken to read ``cost`` bytes.
        rounds: whether its products take ``activation_bits``, as their last argument.

    Raises:
        InvalidKernelError: another kernel has the name (the same one may come again), no operator has the suffix, or there is no
            such layout.
    """
    return add(Kernel(name, suffix, supports, cost, layout, works, rounds))


def add(kernel: Kernel) -> Kernel:
    """Register a record.

    Raises:
        InvalidKernelError: as :func:`register_kernel`.
    """
    if kernel.layout not in LAYOUTS:
        raise InvalidKernelError(f"kernel {kernel.name!r} has the layout {kernel.layout!r}; give one of {', '.join(LAYOUTS)}")
    if not any(hasattr(torch.ops.kbit, family + kernel.suffix) for family in FAMILIES):
        raise InvalidKernelError(
            f"kernel {kernel.name!r} has no operator kbit::linear{kernel.suffix} or of another family; define it first by "
            f"kbit_inductor.lowering.ops.define('linear', {kernel.suffix!r})"
        )
    with _lock:
        taken = {each.name: each for each in registry.KERNELS} | _by_name
        if taken.get(kernel.name, kernel) != kernel:
            raise InvalidKernelError(f"there is another kernel of the name {kernel.name!r}; register this one by another name")
        _by_name[kernel.name] = kernel
    return kernel


def kernels() -> tuple[Kernel, ...]:
    """All kernels of this process, those of entry points among them.

    Raises:
        InvalidKernelError: an entry point that names no kernel, or a kernel that :func:`register_kernel` would refuse.
    """
    for origin, found in load(GROUP):
        if not isinstance(found, Kernel):
            raise InvalidKernelError(f"{origin} names a {type(found).__name__}; let it name a Kernel")
        add(found)
    return (*registry.KERNELS, *(kernel for _, kernel in sorted(_by_name.items())))
