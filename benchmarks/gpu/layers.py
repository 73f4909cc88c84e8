"""Single layers, ``y = x Wᵀ``, every number of rows of x and of bits, beside cuBLAS and other libraries in the same run.

A point is a CUDA graph over a chain of different layers, enough of them that the cache is cold for each. The points that matter
most come first, so that a run that ends early has them.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpu.contenders import Contender
from gpu.machine import Ceilings, allocated, l2_bytes
from gpu.session import Row, Session

SHAPES = ((8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336))  # N × K
INPUTS = (1, 16, 256, 64, 4096, 8, 128, 4, 32, 2, 512, 1024, 2048)
TINY = {"shapes": ((64, 256),), "inputs": (1, 4)}
LEAST, MOST = 8, 64  # layers of a chain
COLDER = 3  # times the cache that the weights of a chain take


@dataclass
class Copies:
    """A contender's copies of one layer, and the bytes that a product reads of one."""

    modules: list[nn.Module]
    nbytes: int


class Stock:
    """The layers of one shape, by contender; made when first asked for, all from one float weight."""

    def __init__(self, session: Session, shape: tuple[int, int]) -> None:
        self.session, self.shape = session, shape
        self.made: dict[Contender, Copies | str] = {}

    def of(self, contender: Contender) -> Copies:
        """Raises what its library raised, each time."""
        if contender not in self.made:
            try:
                self.made[contender] = self._make(contender)
            except Exception as error:  # whatever a library raises is the reason why it has no row
                self.made[contender] = f"{type(error).__name__}: {error}"
        made = self.made[contender]
        if isinstance(made, str):
            raise RuntimeError(made)
        return made

    def _make(self, contender: Contender) -> Copies:
        device, (rows, columns) = self.session.device, self.shape
        torch.manual_seed(0)
        linear = nn.Linear(columns, rows, bias=False, device=device, dtype=contender.dtype).requires_grad_(False)
        first = contender.convert(linear)
        before = allocated(device)
        modules = [first, copy.deepcopy(first)]
        nbytes = max(allocated(device) - before, bytes_of(first))
        wanted = math.ceil(COLDER * l2_bytes(device) / nbytes)
        while len(modules) < min(max(wanted, LEAST if not self.session.rehearsal else 2), MOST):
            modules.append(copy.deepcopy(first))
        return Copies(modules, nbytes)


def bytes_of(module: nn.Module) -> int:
    """Of its parameters and buffers, those that are no part of a state dict included."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def measure(session: Session, contenders: Sequence[Contender], ceilings: Ceilings) -> None:
    """All points, as rows of the session's part."""
    shapes: Any = TINY["shapes"] if session.rehearsal else SHAPES
    stocks = {shape: Stock(session, shape) for shape in shapes}
    for inputs, shape, contender in points(session.rehearsal, shapes, contenders):
        what: Row = {"n": shape[0], "k": shape[1], "m": inputs, "contender": contender.name, "bits": contender.bits}
        with session.row(what) as there_is_time:
            if there_is_time:
                session.say(f"{shape[0]}×{shape[1]}, {inputs} rows of x: {contender.name}")
                session.add(what | _point(session, stocks[shape].of(contender), shape, inputs, contender, ceilings))
    stocks.clear()
    gc.collect()


def points(
    rehearsal: bool, shapes: Sequence[tuple[int, int]], contenders: Sequence[Contender]
) -> Iterator[tuple[int, tuple[int, int], Contender]]:
    """What to measure, the most important first."""
    for inputs in TINY["inputs"] if rehearsal else INPUTS:
        for shape in shapes:
            for contender in contenders:
                yield int(inputs), shape, contender  # type: ignore[call-overload]


def _point(session: Session, copies: Copies, shape: tuple[int, int], inputs: int, contender: Contender, ceilings: Ceilings) -> Row:
    rows, columns = shape
    x = torch.randn(inputs, columns, dtype=contender.dtype, device=session.device)
    seconds = session.clock.seconds([functools.partial(module, x) for module in copies.modules])
    moved = copies.nbytes + x.element_size() * inputs * (rows + columns)
    return {
        "seconds": seconds,
        "bytes": copies.nbytes,
        "chain": len(copies.modules),
        "roofline_share": ceilings.seconds(moved, 2.0 * inputs * rows * columns) / seconds,
    }
