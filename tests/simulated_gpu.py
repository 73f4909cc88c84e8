"""A GPU of discrete events, to try a cost model and an autotuner on where no GPU is.

Programs wait in a queue; a multiprocessor takes one when it has room. A program reads, issues and multiplies at a rate that it
shares with those that run beside it, after a latency. Nothing of it is a formula of the cost model but the work of a program. No
two configurations are alike on a real GPU: each is a few percent off, the same at every call.
"""

from __future__ import annotations

import hashlib
import heapq
import math

from kbit_inductor.kernels.triton.config import Config
from kbit_inductor.lowering.cost import triton_linear
from kbit_inductor.lowering.cost.device import LATENCY, DeviceRecord
from kbit_inductor.lowering.problem import Problem

LUCK = 0.03  # how far a configuration is off, at most


def simulate(problem: Problem, m: int, config: Config, device: DeviceRecord, luck: float = LUCK) -> float:
    """Seconds that the product takes on the simulated GPU."""
    work = triton_linear.linear(problem, config, device).quantities(m)
    programs, resident = int(work.programs), max(1, int(work.resident))
    share = {name: float(getattr(work, name)) / programs for name in ("bytes", "l2_bytes", "instructions", "products")}
    processors = [(0.0, index) for index in range(device.multiprocessors) for _ in range(resident)]
    heapq.heapify(processors)
    slots = len(processors)
    last = 0.0
    for started in range(programs):
        free, index = heapq.heappop(processors)
        crowd = min(programs - started // slots * slots, slots)  # of the last wave there are fewer
        beside = math.ceil(crowd / device.multiprocessors)
        end = free + LATENCY + _alone(share, int(work.warps), beside, crowd, float(work.in_flight), device)
        last = max(last, end)
        heapq.heappush(processors, (end, index))
    return (float(work.launches) * device.launch + last) * (1 + luck * _luck(config))


def _alone(share: dict[str, float], warps: int, beside: int, crowd: int, in_flight: float, device: DeviceRecord) -> float:
    """Seconds of a program that runs with ``beside`` others on its multiprocessor and ``crowd`` on the device."""
    each = device.multiprocessors * beside
    reading = share["bytes"] / min(device.bandwidth / crowd, max(in_flight, 1) / LATENCY)
    cached = share["l2_bytes"] * crowd / device.l2_bandwidth
    issuing = share["instructions"] * each / device.instruction_rate / min(1.0, beside * warps / 8)
    multiplying = share["products"] * each / device.matrix_rate
    return max(reading, cached, issuing, multiplying)


def _luck(config: Config) -> float:
    """From -1 to 1, the same at every call."""
    return int.from_bytes(hashlib.sha256(repr(config).encode()).digest()[:4], "big") / 2**31 - 1
