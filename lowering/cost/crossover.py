"""Which kernel is fastest for which number of rows: a table of ranges, for graphs in which that number is not known.

A graph with a symbolic M must not ask for its value, which would be a guard and so a compile for each. It takes the table along,
and a launch looks up the M that it has.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kbit_inductor.lowering.cost import time
from kbit_inductor.lowering.cost.device import DeviceRecord
from kbit_inductor.lowering.cost.work import Work

LONGEST = 8192
"""Rows up to which every number is looked at. What is best there is best beyond."""


@dataclass(frozen=True)
class RangeTable:
    """The fastest of several kernels by M.

    Attributes:
        starts: ascending, the first is 1: the least M of each range.
        names: the kernel of each range.
    """

    starts: tuple[int, ...]
    names: tuple[str, ...]

    def at(self, m: int) -> str:
        """The kernel for ``m`` rows; that of one row for none."""
        return self.names[max(0, bisect.bisect_right(self.starts, m) - 1)]

    def __str__(self) -> str:
        ends = [str(start - 1) for start in self.starts[1:]]
        texts = [f"M {a}" if str(a) == b else f"M {a}..{b}" for a, b in zip(self.starts, ends, strict=False)]
        last = f"M >= {self.starts[-1]}"
        return ", ".join(f"{where}: {name}" for where, name in zip([*texts, last], self.names, strict=True))


def crossovers(kernels: Mapping[str, Sequence[Work]], device: DeviceRecord, longest: int = LONGEST) -> RangeTable:
    """The table for ``kernels``: by name, the ways in which each can do the same product. Of equals the first is taken."""
    m = np.arange(1, longest + 1)
    best = np.stack([np.stack([time.seconds(work, device, m) for work in works]).min(0) for works in kernels.values()]).argmin(0)
    starts = [0, *(np.flatnonzero(np.diff(best)) + 1)]
    names = list(kernels)
    return RangeTable(tuple(int(m[start]) for start in starts), tuple(names[best[start]] for start in starts))
