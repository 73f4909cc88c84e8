"""How long each layer is expected to take on a device, and what bounds it: the cost model's answer for ``explain``.

The cost model is imported when a time is asked for: sympy takes half a second.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kbit_inductor._compat import hint
from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.kernel_registry import kernels
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import Kernel, choose

if TYPE_CHECKING:
    from kbit_inductor.lowering.cost.crossover import RangeTable
    from kbit_inductor.lowering.cost.device import DeviceRecord

Rows = int | torch.SymInt | None
"""Rows of x; None where they are not known: then one is assumed, as in decoding."""


@dataclass(frozen=True)
class Expectation:
    """The expected time of one product or look-up.

    Attributes:
        device: name of the device's record.
        m: rows of x.
        kernel: that would be chosen there.
        seconds: in all.
        bound: what takes longest: ``"memory"``, ``"L2 cache"``, ``"instructions"``, ``"tensor cores"`` or ``"launch"``.
        ranges: the fastest kernel by M, and its way where it has several.
    """

    device: str
    m: int
    kernel: str
    seconds: float
    bound: str
    ranges: RangeTable

    def __str__(self) -> str:
        return f"{1e6 * self.seconds:.3g} µs by {self.kernel}: {self.bound} (M {self.m})"


class Clock:
    """Expected times on one device, or else on the GPU that a weight is on.

    Raises:
        InvalidOptionError: as :func:`device_record`.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self._device = device
        if device is not None:
            device_record(device)  # told before anything runs

    def times(
        self, uses: Iterable[tuple[Problem | None, Rows]], config: LayerConfig, on: torch.device | None = None
    ) -> tuple[Expectation, ...]:
        """Of ``uses`` of a weight that is ``on`` some device, in their order."""
        device = self._device or (on if on is not None and on.type == "cuda" else None)
        if device is None:
            return ()
        record = device_record(device)
        there: dict[str, Any] = {"device": record.type, "activation_bits": config.activation_bits_on(record.type)}
        return tuple(
            _expected(dataclasses.replace(problem, **there), _number(m), record, kernels())
            for problem, m in uses
            if problem is not None and problem.rows * problem.columns
        )


def device_record(device: str | torch.device) -> DeviceRecord:
    """The record of ``"h200"`` and the like, of ``"cpu"``, or of a GPU of this machine, ``"cuda"`` or ``"cuda:1"``.

    A device of this machine that no record is shipped for is measured, which takes a second.

    Raises:
        InvalidOptionError: it is none of these, or there is no such GPU.
    """
    from kbit_inductor.lowering.cost.device import find, shipped
    from kbit_inductor.lowering.cost.measure import record_of

    if (record := find(str(device))) is not None:
        return record
    names = ", ".join(each.name for each in shipped())
    try:
        own = torch.device(device)
    except RuntimeError:
        raise InvalidOptionError(f"there is no device {device!r}; give 'cpu', 'cuda' or one of {names}") from None
    if own.type == "cpu":
        return record_of(own)
    if own.type != "cuda" or not torch.cuda.is_available() or (own.index or 0) >= torch.cuda.device_count():
        raise InvalidOptionError(f"this machine has no device {device!r}; give 'cpu' or one of {names}")
    return record_of(own if own.index is not None else torch.device("cuda", torch.cuda.current_device()))


def _number(m: Rows) -> int:
    return 1 if m is None else m if isinstance(m, int) else hint(m)


@functools.lru_cache(maxsize=1024)  # the layers of a model have few shapes
def _expected(problem: Problem, m: int, record: DeviceRecord, known: tuple[Kernel, ...]) -> Expectation:
    from kbit_inductor.lowering.cost.expected import expected, range_table

    kernel = choose(problem, known).kernel
    found = expected(kernel, problem, record, m)
    alike = [each for each in known if each.layout == kernel.layout]  # a launch may choose among them: they read the same weight
    return Expectation(record.name, m, kernel.name, found.seconds, found.bound, range_table(alike, problem, record))
