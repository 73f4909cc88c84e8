"""The time of a launch on a GPU: a CUDA graph of a chain of launches, each on a weight that is in no cache.

A packed weight may lie in the L2 cache, as it never does in a model, so copies of it are rotated (Triton's ``do_bench`` clears the
cache between launches to the same end). A launch alone takes longer than the kernel, so a graph of many is timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kbit_inductor.kernels.layout import group_count
from kbit_inductor.kernels.triton.config import Config
from kbit_inductor.kernels.words import WordLayout
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.tuner.tune import DoesNotFit, Timer

MOST_COPIES = 64
LEAST_LAUNCHES = 16
REPLAYS = 5


def gpu_timer(problem: Problem, m: int, device: torch.device) -> Timer:
    """The timer of a product on random weights."""
    from triton.errors import TritonError

    launches = _launches(problem, m, device)

    def timer(config: Config) -> float:
        try:
            with torch.cuda.device(device):
                return _graph_seconds([functools.partial(launch, config) for launch in launches])
        except (TritonError, torch.cuda.OutOfMemoryError) as error:  # what does not compile too
            raise DoesNotFit(str(error)) from error

    return timer


def _launches(problem: Problem, m: int, device: torch.device) -> list[Callable[[Config], Tensor]]:
    """A launch for each copy of the weight. Together they are larger than twice the L2 cache."""
    from kbit_inductor.kernels.triton.linear import linear

    words = WordLayout.of(problem.bits, problem.columns, problem.group_size).row_words
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(MOST_COPIES, math.ceil(2 * cache / max(1, 2 * problem.rows * words)) + 1)
    groups = group_count(problem.columns, problem.group_size)
    packed = torch.randint(-(2**15), 2**15, (copies, problem.rows, words), dtype=torch.int16, device=device)
    scale = torch.rand(copies, groups, problem.rows, device=device).half()
    one = torch.ones(1, device=device)
    x = torch.randn(m, problem.columns, dtype=problem.dtype, device=device)
    levels = None if problem.uniform else torch.arange(2**problem.bits, dtype=torch.uint8, device=device)

    def launch(copy: int) -> Callable[[Config], Tensor]:
        offset = None if problem.symmetric else scale[copy]
        operands = (x, packed[copy], scale[copy], offset, one, None, problem.bits, problem.group_size, levels)
        return lambda config: linear(*operands, activation_bits=problem.activation_bits, config=config)

    return [launch(copy) for copy in range(copies)]


def _graph_seconds(calls: list[Callable[[], object]]) -> float:
    """Seconds of a call: the least of several replays of a graph of them all."""
    calls = calls * math.ceil(LEAST_LAUNCHES / len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = math.inf
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3)
    return best / len(calls)
