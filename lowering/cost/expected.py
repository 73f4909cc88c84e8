"""The expected time of a kernel of the registry, and which of several is fastest for which number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kbit_inductor.lowering.cost import products
from kbit_inductor.lowering.cost.crossover import RangeTable, crossovers
from kbit_inductor.lowering.cost.device import DeviceRecord
from kbit_inductor.lowering.cost.time import Estimate, estimate
from kbit_inductor.lowering.cost.work import Work
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import Kernel


def works(kernel: Kernel, problem: Problem, device: DeviceRecord) -> Sequence[Work]:
    """The ways in which ``kernel`` can compute ``problem``; of one that brings none, what its ``cost`` says."""
    if kernel.works is not None:
        return kernel.works(problem, device)
    return [products.bound(Work(bytes=kernel.cost(problem) + products.ACTIVATIONS), problem)]


def expected(kernel: Kernel, problem: Problem, device: DeviceRecord, m: int) -> Estimate:
    """How long ``kernel`` takes for ``m`` rows of x."""
    return estimate(works(kernel, problem, device), device, m)


def range_table(kernels: Iterable[Kernel], problem: Problem, device: DeviceRecord) -> RangeTable:
    """The fastest of those of ``kernels`` that can compute ``problem``, by M, and the way where one has several."""
    able: dict[str, list[Work]] = {}
    for kernel in kernels:
        if kernel.supports(problem) is None:
            for work in works(kernel, problem, device):
                able.setdefault(f"{kernel.name} ({work.way})" if work.way else kernel.name, []).append(work)
    return crossovers(able, device)
