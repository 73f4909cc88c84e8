"""Measure a short list of configurations within a limit of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kbit_inductor.kernels.triton.config import Config
from kbit_inductor.lowering.tuner.table import Times

LIMIT = 2.0  # seconds for each shape
Timer = Callable[[Config], float]
"""Seconds of a launch with a configuration. Raises :class:`DoesNotFit`."""


class DoesNotFit(RuntimeError):
    """A configuration that the device has not the registers or the shared memory for."""


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        times: of every configuration that was tried, those of before among them; infinite for one that does not fit.
        dropped: configurations that do not fit, and why.
        complete: whether all were tried. Else the limit was reached, or it was interrupted.
        interrupted: whether it was.
    """

    times: Times
    dropped: tuple[tuple[Config, str], ...] = ()
    complete: bool = True
    interrupted: bool = False


def tune(
    configs: Iterable[Config],
    timer: Timer,
    known: Times | None = None,
    limit: float = LIMIT,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Time ``configs`` in order, but for those that are ``known``, as many as ``limit`` seconds allow.

    The first is always timed. Another one is begun only where the longest so far, compiling included, would still end in time.
    A keyboard interrupt ends it with what there is.
    """
    times = dict(known or {})
    dropped: list[tuple[Config, str]] = []
    start, longest = clock(), 0.0
    for config in configs:
        if config in times:
            continue
        begun = clock()
        if longest and begun + longest > start + limit:
            return Tuned(times, tuple(dropped), complete=False)
        try:
            times[config] = timer(config)
        except DoesNotFit as error:
            times[config] = float("inf")
            dropped.append((config, str(error)))
        except KeyboardInterrupt:
            return Tuned(times, tuple(dropped), complete=False, interrupted=True)
        longest = max(longest, clock() - begun)
    return Tuned(times, tuple(dropped))
