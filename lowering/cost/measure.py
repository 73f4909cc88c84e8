"""A record of a device that none is shipped for, measured in under a second.

What a driver tells is asked for; bandwidth, the rate of products and, on a CPU, the time of a call are timed: by torch's own
operators on a GPU, and by the compiled kernels on a CPU, whose products are what counts there.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable

import torch

from kbit_inductor.lowering.cost.device import LAUNCH, DeviceRecord, find
from kbit_inductor.lowering.requirements import FP8_CAPABILITY

TIME_LIMIT = 0.05  # seconds for each of the timings
LARGE = 2**27  # bytes, more than most caches on a chip
CHUNKS = 64
CPU_LANES = 64  # multiply-adds of 8 bits in an AVX-512 instruction
OLDEST = "sm_80"


@functools.cache
def record_of(device: torch.device) -> DeviceRecord:
    """The record of a device of this machine: the shipped one, or else measured, once for each process."""
    if device.type == "cpu":
        return measure_cpu()
    return find(torch.cuda.get_device_name(device)) or measure_gpu(device)


def measure_cpu() -> DeviceRecord:
    """The CPU with torch's present number of threads, as the compiled kernels find it; where there are none, torch's products."""
    bandwidth = _read_bandwidth()
    rows, columns, bits = 1024, 1024, 4
    many, one, tiny = (_cpu_product(n, rows if n > 0 else 16, columns if n > 0 else 64, bits) for n in (128, 1, 0))
    launch = _seconds(tiny)
    rate = 128 * rows * columns / max(_seconds(many) - launch, 1e-9)
    unpacking = max(0.0, (_seconds(one) - launch) * rate / (rows * columns) - 1)
    cores = torch.get_num_threads()
    return DeviceRecord(
        name="CPU", pattern="", target="cpu", peak_bandwidth=bandwidth, peak_matrix_rate=2 * rate, clock=rate / (cores * CPU_LANES),
        multiprocessors=cores, lanes=CPU_LANES, l2_bytes=0, shared_memory=0, registers=0, threads=1, warp=1,
        source=f"measured with {cores} of {os.cpu_count()} threads", reached_bandwidth=bandwidth, reached_matrix_rate=2 * rate,
        reached_instruction_rate=rate, launch=launch, unpacking=unpacking,
    )  # fmt: skip


def _read_bandwidth() -> float:
    """Bytes/s of reading memory: by the median of short reads, since others may use the machine for a while."""
    chunks = torch.ones(LARGE // 8, dtype=torch.float64).chunk(CHUNKS)
    times = []
    for chunk in chunks:
        start = time.perf_counter()
        chunk.sum()
        times.append(time.perf_counter() - start)
    return chunks[0].nbytes / statistics.median(times)


def _cpu_product(m: int, rows: int, columns: int, bits: int) -> Callable[[], object]:
    """A product of ``max(m, 1)`` rows of x with a weight that stays in a cache."""
    from kbit_inductor.lowering.registry import cpu_library_problem

    x = torch.randn(max(m, 1), columns)
    if cpu_library_problem() is not None:
        weight = torch.randn(rows, columns)
        return lambda: torch.nn.functional.linear(x, weight)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scale = torch.ones(rows, columns // 64, dtype=torch.float16)
    tiled = torch.ops.kbit.tile_cpu(codes, scale, scale, torch.ones(1), bits, 64)
    return lambda: torch.ops.kbit.linear_cpu(x, tiled, None, rows, 8)


def measure_gpu(device: torch.device) -> DeviceRecord:
    """A GPU that no record is shipped for."""
    known = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    with torch.cuda.device(device):
        half = torch.empty(min(LARGE, known.total_memory // 8) // 2, dtype=torch.float16, device=device)
        other = torch.empty_like(half)
        square = torch.randn(4096, 4096, dtype=torch.float16, device=device)
        synchronize = functools.partial(torch.cuda.synchronize, device)
        bandwidth = 2 * half.nbytes / _seconds(lambda: other.copy_(half), synchronize)
        rate = 2 * 4096**3 / _seconds(lambda: torch.mm(square, square), synchronize)
    clock = getattr(known, "clock_rate", 1_500_000) * 1e3
    lanes = 64 if amd or known.major < 8 else 128
    target = "gfx942" if amd else _nearest(known.major, known.minor)
    fp8_rate = 2 * rate if not amd and (known.major, known.minor) >= FP8_CAPABILITY else 0.0
    return DeviceRecord(
        name=known.name, pattern="", target=target, peak_bandwidth=bandwidth, peak_matrix_rate=rate, clock=clock,
        multiprocessors=known.multi_processor_count, lanes=lanes, l2_bytes=known.L2_cache_size,
        shared_memory=getattr(known, "shared_memory_per_multiprocessor", 65536),
        registers=getattr(known, "regs_per_multiprocessor", 65536), threads=known.max_threads_per_multi_processor,
        warp=known.warp_size, source="measured", peak_fp8_rate=fp8_rate, reached_bandwidth=bandwidth, reached_matrix_rate=rate,
        launch=LAUNCH,
    )  # fmt: skip


def _nearest(major: int, minor: int) -> str:
    """The target with counted instructions that a compute capability is nearest to."""
    counted = {(8, 0): "sm_80", (8, 6): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100"}
    older = [capability for capability in counted if capability <= (major, minor)]
    return counted[max(older)] if older else OLDEST


def _seconds(call: Callable[[], object], synchronize: Callable[[], object] = lambda: None) -> float:
    """The least time of a call, of as many as :data:`TIME_LIMIT` allows, at least two after the first."""
    call()
    synchronize()
    best, end, calls = math.inf, time.perf_counter() + TIME_LIMIT, 0
    while calls < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronize()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best
