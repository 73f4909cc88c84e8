"""What of a device decides how long a product takes: published figures of known ones, as data.

A record is looked up by a short name (``"H200"``) or by the name that a driver gives (``"NVIDIA H200"``). One that is not here is
measured (:mod:`.measure`). The figures are the makers' own, each record says which document; what is reached of them is measured
where it says so.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

RECORDS = Path(__file__).with_name("devices.json")
REACHED_BANDWIDTH = 4.3 / 4.8
"""Share of the published bandwidth that a copy reaches, where none was measured: that of an H200."""
REACHED_MATRIX_RATE = 790 / 989.4
"""Share of the published matrix rate that a product reaches, where none was measured: that of an H200."""
LAUNCH = 2e-6
"""Seconds from the end of a kernel to the work of the next one within a CUDA graph, where none was measured: an assumption."""
LATENCY = 8e-7
"""Seconds that a load from memory takes under load: an assumption for all GPUs."""
L2_BYTES_PER_CLOCK = 5120 / 108
"""Bytes that a multiprocessor reads from the L2 cache in a clock: an A100's (NVIDIA's Ampere whitepaper), taken for all."""


@dataclass(frozen=True)
class DeviceRecord:
    """A device as the cost model sees it.

    Attributes:
        name: short, unique.
        pattern: of the names that a driver gives it, a regular expression.
        target: the compile target whose instructions were counted, ``"sm_90"`` for one; ``"cpu"`` for a CPU.
        peak_bandwidth: published, bytes/s.
        peak_matrix_rate: published, operations/s of 16-bit products with float32 sums, dense.
        peak_integer_rate: the same, of int8 products. 0: unknown, and taken for twice as many.
        peak_fp8_rate: the same, of 8-bit floats (e4m3) with float32 sums. 0: none, and float16 holds them.
        clock: Hz under load.
        multiprocessors: streaming multiprocessors or compute units; cores of a CPU.
        lanes: threads of a multiprocessor for which an instruction is issued in a clock.
        l2_bytes: of the L2 cache.
        shared_memory: bytes of a multiprocessor.
        registers: 32-bit, of a multiprocessor.
        threads: that a multiprocessor holds.
        warp: threads of a warp.
        source: where the figures are from.
        reached_bandwidth, reached_matrix_rate, reached_instruction_rate: measured, or 0.
        launch: seconds of a launch.
        unpacking: of a CPU: multiply-adds in whose time a weight is unpacked.
    """

    name: str
    pattern: str
    target: str
    peak_bandwidth: float
    peak_matrix_rate: float
    clock: float
    multiprocessors: int
    lanes: int
    l2_bytes: int
    shared_memory: int
    registers: int
    threads: int
    warp: int
    source: str
    peak_integer_rate: float = 0.0
    peak_fp8_rate: float = 0.0
    reached_bandwidth: float = 0.0
    reached_matrix_rate: float = 0.0
    reached_instruction_rate: float = 0.0
    launch: float = LAUNCH
    unpacking: float = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes/s that can be reached."""
        return self.reached_bandwidth or REACHED_BANDWIDTH * self.peak_bandwidth

    @property
    def matrix_rate(self) -> float:
        """Operations/s that can be reached."""
        return self.reached_matrix_rate or REACHED_MATRIX_RATE * self.peak_matrix_rate

    def speedup(self, dtype: torch.dtype) -> float:
        """Times as many products of ``dtype`` as 16-bit ones in a second."""
        rate = {torch.int8: self.peak_integer_rate or 2 * self.peak_matrix_rate, torch.float8_e4m3fn: self.peak_fp8_rate}
        return rate.get(dtype, self.peak_matrix_rate) / self.peak_matrix_rate

    @property
    def takes_fp8(self) -> bool:
        """Whether its matrix units multiply 8-bit floats (e4m3)."""
        return self.peak_fp8_rate > 0

    @property
    def instruction_rate(self) -> float:
        """Instructions/s, one for each thread counted; on a CPU, multiply-adds of its kernels."""
        return self.reached_instruction_rate or self.multiprocessors * self.lanes * self.clock

    @property
    def l2_bandwidth(self) -> float:
        """Bytes/s from the L2 cache."""
        return self.multiprocessors * L2_BYTES_PER_CLOCK * self.clock

    @property
    def is_amd(self) -> bool:
        """Whether it is one of AMD's."""
        return self.target.startswith("gfx")

    @property
    def kept_shared(self) -> int:
        """Bytes of shared memory that each program takes beside its own (CUDA C++ Programming Guide, compute capability 8.0 up)."""
        return 0 if self.is_amd else 1024

    @property
    def has_wgmma(self) -> bool:
        """Whether four warps multiply together (Hopper)."""
        return self.target == "sm_90"

    @property
    def least_rows(self) -> int:
        """Rows of x that an instruction of its matrix units takes at least."""
        return 16 if self.is_amd else 8

    @property
    def type(self) -> str:
        """The type of its torch devices: AMD's are called ``"cuda"`` too."""
        return "cpu" if self.target == "cpu" else "cuda"


@functools.cache
def shipped() -> tuple[DeviceRecord, ...]:
    """The records that come with the package."""
    return tuple(DeviceRecord(**record) for record in json.loads(RECORDS.read_text(encoding="utf-8"))["records"])


def find(name: str) -> DeviceRecord | None:
    """The shipped record of a short name, in any case, or of a driver's name; None for an unknown device."""
    for record in shipped():
        if record.name.lower() == name.lower() or re.search(record.pattern, name):
            return record
    short = [record for record in shipped() if record.name.lower().startswith(name.lower() + "-")]
    return short[0] if short else None
