"""What times calls: a GPU's own events around a CUDA graph, or, to rehearse without a GPU, nothing at all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
WARM_UP = 2


class Clock(Protocol):
    """Something that tells how long a call takes."""

    rehearsal: bool

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one of ``calls``, which are called one after the other; at least one."""


class CudaClock:
    """The median time of a CUDA graph of the whole chain, over its length: no launch from Python is in it.

    A single launch of a few microseconds cannot be timed alone. Calls of a chain with memory of their own find the caches cold.
    """

    rehearsal = False

    def __init__(self, repeats: int = 12) -> None:
        self.repeats = repeats

    def seconds(self, calls: Sequence[Call]) -> float:
        """As :class:`Clock` says. A chain that cannot be captured raises what torch raises."""
        graph = _captured(calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        graph.replay()
        for _ in range(self.repeats):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times) / len(calls)


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    # The first calls compile and allocate, which must not be captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            for call in dict.fromkeys((calls[0], calls[-1])):
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


class RehearsalClock:
    """Calls everything once and tells the same time of each: its figures mean nothing, and are marked."""

    rehearsal = True

    def seconds(self, calls: Sequence[Call]) -> float:
        """A microsecond."""
        for call in calls:
            call()
        return 1e-6
