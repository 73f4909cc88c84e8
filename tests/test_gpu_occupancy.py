"""Registers and shared memory of what is launched by default, against what the cost model takes and what devices have."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from gpu.instructions import DEVICES, FP8, GROUP_SIZE, ROUNDED, SIZE, compile_product, name_of
from gpu.occupancy import DTYPES, RESULTS, ROWS

from kbit_inductor.kernels import layout as packed
from kbit_inductor.kernels.triton.config import Config, default_config, shared_bytes
from kbit_inductor.kernels.words import WordLayout
from kbit_inductor.lowering.cost import triton_linear
from kbit_inductor.lowering.cost.device import DeviceRecord, shipped
from kbit_inductor.lowering.problem import Problem

TABLE = json.loads(RESULTS.read_text())
RECORDS: list[dict[str, Any]] = TABLE["records"]
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")


def x_of(record: dict[str, Any]) -> torch.dtype:
    return getattr(torch, record["x"])


def test_every_default_configuration_was_compiled() -> None:
    found = {(each["target"], each["x"], each["bits"], Config(**each["config"])) for each in RECORDS}
    assert found == {
        (target, name_of(dtype), bits, default_config(m, SIZE, layout, dtype, device))
        for target, device in DEVICES.items()
        for dtype in DTYPES
        for bits in range(1, 9)
        for layout in [WordLayout.of(bits, SIZE, GROUP_SIZE)]
        for m in ROWS
    }


def test_none_needs_more_shared_memory_than_there_is() -> None:
    for each in RECORDS:
        device, layout = DEVICES[each["target"]], WordLayout.of(each["bits"], SIZE, GROUP_SIZE)
        assert each["shared"] <= device.shared_memory, each
        told = shared_bytes(Config(**each["config"]), layout, x_of(each), device)
        # Of sm_100, one of float32 goes through the matrix units' own memory.
        assert each["shared"] <= told or (each["target"], each["x"]) == ("sm_100", "float32"), each


def test_what_spills() -> None:
    """Of float16 and bfloat16 nothing but 5 bits at 9 to 16 rows on sm_100, where what spills nothing takes twice the instructions.

    Of activations of 8 bits a few registers, since the compiler makes room for one more program; hardly any in the main loop.
    """
    spilling = [each for each in RECORDS if each["spill_bytes"]]
    halves = {
        (each["target"], each["x"], each["bits"], each["rows"]): (each["spill_bytes"], each["spilling_in_loop"])
        for each in spilling
        if getattr(torch, each["x"]) not in ROUNDED
    }
    assert halves == {("sm_100", "float16", 5, 16): (16, 0), ("sm_100", "bfloat16", 5, 16): (40, 4)}
    assert all(
        each["spill_bytes"] <= 24 and each["spilling_in_loop"] <= 4 for each in spilling if getattr(torch, each["x"]) in ROUNDED
    )
    assert len(spilling) < len(RECORDS) / 30 and sum(each["spilling_in_loop"] == 0 for each in spilling) > len(spilling) / 2


def resident(device: DeviceRecord, record: dict[str, Any]) -> int:
    """Programs that a multiprocessor holds of a compiled kernel (CUDA C++ Programming Guide, "Hardware Multithreading")."""
    threads = record["config"]["num_warps"] * device.warp
    registers = -(-record["registers"] // 8) * 8
    return min(
        device.registers // (registers * threads), device.shared_memory // (record["shared"] + device.kept_shared),
        device.threads // threads, 32,
    )  # fmt: skip


@pytest.mark.parametrize("device", shipped(), ids=lambda device: device.name)
def test_a_multiprocessor_holds_as_many_programs_as_the_cost_model_takes(device: DeviceRecord) -> None:
    mine = [each for each in RECORDS if each["target"] == device.target]
    assert len(mine) > 50
    for each in mine:
        x, sizes = x_of(each), (SIZE, SIZE, each["bits"], GROUP_SIZE)
        if x == FP8 and DEVICES[device.target].takes_fp8 != device.takes_fp8:
            continue  # sm_86, which has none, stands in for GPUs that have
        rounding = {torch.int8: 8, FP8: packed.FP8}.get(x, 16)
        asked = Problem("linear", "cuda", torch.float16 if x in ROUNDED else x, *sizes, activation_bits=rounding)
        work = triton_linear.linear(asked, Config(**each["config"]), device)
        assert 1 <= int((work.then or work).quantities(each["rows"]).resident) <= resident(device, each), each


@compiled
@pytest.mark.parametrize(("target", "bits", "rows"), [("sm_86", 4, 64), ("gfx942", 3, 64)])
def test_the_table_is_what_is_compiled(target: str, bits: int, rows: int) -> None:
    kernel, _ = compile_product(target, bits, rows)
    key = {"target": target, "x": "float16", "bits": bits, "rows": rows}
    (record,) = (each for each in RECORDS if each.items() >= key.items())
    assert kernel.shared == record["shared"]
    if triton.__version__ == TABLE["setting"]["triton"]:
        assert (kernel.registers, kernel.spill_bytes) == (record["registers"], record["spill_bytes"])
