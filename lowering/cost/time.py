"""From work and a device to a time, and to what bounds it.

A kernel takes as long as its slowest resource: memory, the L2 cache, the issue of instructions, the matrix units (the roofline of
Williams et al., 2009, with a roof for each). Of the others, a share is not hidden behind it. Each is the slower, the less of the
device the programs fill::

    tail         a multiprocessor has ceil(programs / multiprocessors) of them: wave quantization
    issue        too few warps on a multiprocessor to issue an instruction in each clock
    in flight    fewer bytes under way than bandwidth times latency (Little's law)

To that come the launch, and a latency for each wave of programs, whose first loads nothing hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from kbit_inductor.lowering.cost.device import LATENCY, DeviceRecord
from kbit_inductor.lowering.cost.work import Work

FULL_ISSUE_WARPS = 8
"""Warps that a multiprocessor needs so that one is always ready: two for each of four schedulers."""
BOUNDS = ("memory", "L2 cache", "instructions", "tensor cores")


@dataclass(frozen=True)
class Estimate:
    """How long a kernel is expected to take.

    Attributes:
        seconds: in all.
        bound: what takes longest, one of :data:`BOUNDS` or ``"launch"``.
        parts: seconds of each of :data:`BOUNDS` alone, and of ``"launch"``.
    """

    seconds: float
    bound: str
    parts: tuple[tuple[str, float], ...]


def seconds(work: Work, device: DeviceRecord, m: ArrayLike) -> Any:
    """The time for ``m`` rows of x, one or an array of them."""
    own = _total(_parts(work, device, m), work.unhidden)
    return own if work.then is None else own + seconds(work.then, device, m)


def estimate(works: Sequence[Work], device: DeviceRecord, m: int) -> Estimate:
    """The time of the fastest of several ways to do the same."""
    best = min(works, key=lambda work: float(seconds(work, device, m)))
    parts = dict.fromkeys((*BOUNDS, "launch"), 0.0)
    kernel: Work | None = best
    while kernel is not None:
        parts = {name: parts[name] + float(part) for name, part in _parts(kernel, device, m).items()}
        kernel = kernel.then
    return Estimate(float(seconds(best, device, m)), max(parts, key=lambda name: parts[name]), tuple(parts.items()))


def _total(parts: dict[str, Any], unhidden: float) -> Any:
    roofs = np.stack([parts[name] for name in BOUNDS])
    slowest = roofs.max(0)
    return parts["launch"] + slowest + unhidden * (roofs.sum(0) - slowest)


def _parts(work: Work, device: DeviceRecord, m: ArrayLike) -> dict[str, Any]:
    done = work.quantities(m)
    processors = device.multiprocessors
    filled = done.programs > 0
    programs = np.where(filled, done.programs, processors)
    tail = np.ceil(programs / processors) * processors / programs
    together = np.minimum(np.ceil(programs / processors), np.maximum(done.resident, 1))
    waves = np.ceil(programs / (processors * np.maximum(done.resident, 1)))
    issue = np.where(filled, np.minimum(1, together * done.warps / FULL_ISSUE_WARPS), 1)
    under_way = np.minimum(programs, processors * np.maximum(done.resident, 1)) * done.in_flight
    reading = np.where(done.in_flight > 0, np.minimum(1, under_way / (device.bandwidth * LATENCY)), 1)
    return {
        "memory": done.bytes / device.bandwidth / reading,
        "L2 cache": done.l2_bytes / device.l2_bandwidth,
        "instructions": done.instructions / device.instruction_rate * tail / issue,
        "tensor cores": done.products / device.matrix_rate * tail,
        "launch": done.launches * device.launch + np.where(filled, waves * LATENCY, 0),
    }
