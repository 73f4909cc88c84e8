"""Times contenders by turns in one process, so that a slow spell of the machine strikes all of them.

A turn is a few milliseconds of calls to one contender; then comes a rest, since the threads of a pool go on spinning after their
last call, OpenMP's for some 5 ms and ONNX Runtime's for 50, and would take a core from the next contender.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[], Any]
Say = Callable[[str], None]
REST, RESTS = 0.005, 40  # seconds of a sleep after which it is looked whether threads still spin, and how often at most


def silent(what: str) -> None:
    """A :data:`Say` for those who do not listen to what is being done."""


@dataclass(frozen=True)
class Budget:
    """How long to measure: ``seconds`` for all contenders together, but at least ``rounds`` turns of each."""

    seconds: float
    rounds: int = 3
    turn: float = 0.005
    rest: bool = True


def interleave(contenders: Mapping[str, Sequence[Call]], budget: Budget) -> dict[str, list[float]]:
    """Seconds of each call of each contender, which goes round its calls, one for each copy of its weights."""
    cycles = {name: itertools.cycle(calls) for name, calls in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + budget.seconds
    rounds = 0
    while rounds < budget.rounds or time.perf_counter() < end:
        for name, calls in cycles.items():
            seconds[name] += _turn(calls, budget.turn)
            if budget.rest:
                rest()
        rounds += 1
    return seconds


def _turn(calls: itertools.cycle[Call], length: float) -> list[float]:
    """One call to wake the threads, then timed ones for ``length`` seconds, one at least."""
    next(calls)()
    seconds = []
    end = time.perf_counter() + length
    while True:
        call = next(calls)
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        seconds.append(now - start)
        if now > end:
            return seconds


def rest() -> None:
    """Sleep until no thread of this process is busy any more, though not for ever."""
    for _ in range(RESTS):
        before = time.process_time()
        time.sleep(REST)
        if time.process_time() - before < REST / 20:
            return


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and the middle 80 % of some times, in seconds."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "p10": ordered[tenth],
        "p90": ordered[-1 - tenth],
        "calls": len(ordered),
    }
