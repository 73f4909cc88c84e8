"""Registers and shared memory of every configuration that is launched by default: ``python benchmarks/gpu/occupancy.py``.

Writes benchmarks/results/gpu_occupancy.json, which tests/test_gpu_occupancy.py compares with what the cost model takes for them and
with what the devices have. It needs a few minutes and no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks/, where the package gpu is, in place of this folder

from gpu.instructions import DEVICES, FP8, GROUP_SIZE, SIZE, compile_product, name_of
from kbit_inductor.kernels.triton.aot import CompiledKernel
from kbit_inductor.kernels.triton.config import default_config
from kbit_inductor.kernels.words import WordLayout

RESULTS = Path(__file__).parents[1] / "results" / "gpu_occupancy.json"
ROWS = (1, 16, 32, 64, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, FP8)
SPILLING = ("LDL", "STL", "scratch_")  # instructions begin so


def records() -> Iterator[dict[str, object]]:
    """One for each target, dtype of x, bits and different configuration."""
    for target, device in DEVICES.items():
        for dtype in DTYPES:
            for bits in range(1, 9):
                layout = WordLayout.of(bits, SIZE, GROUP_SIZE)
                configs = {default_config(m, SIZE, layout, dtype, device): m for m in reversed(ROWS)}
                for config, m in reversed(configs.items()):
                    kernel, _ = compile_product(target, bits, m, dtype)
                    found = {"registers": kernel.registers, "shared": kernel.shared, **spilling(kernel)}
                    key = {"target": target, "x": name_of(dtype), "bits": bits, "rows": m}
                    yield {**key, **found, "config": dataclasses.asdict(config)}


def spilling(kernel: CompiledKernel) -> dict[str, int]:
    """What a thread keeps on its stack and, if it does, how many instructions of the main loop write or read it."""
    found = {"spill_bytes": kernel.spill_bytes}
    if kernel.spill_bytes:
        found["spilling_in_loop"] = sum(opcode.startswith(SPILLING) for opcode in kernel.main_loop)
    return found


def main() -> None:
    found = []
    for record in records():
        found.append(record)
        print(record, flush=True)
    setting = {"triton": triton.__version__, "n": SIZE, "k": SIZE, "group_size": GROUP_SIZE}
    lines = ",\n".join("    " + json.dumps(record) for record in found)
    RESULTS.write_text(f'{{\n  "setting": {json.dumps(setting)},\n  "records": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
