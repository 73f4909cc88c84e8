"""What launches of several matrices compile to beside a plain product: ``python benchmarks/gpu/fused.py``.

Queries, keys and values in one launch, and a gate with its factor, at every configuration that is launched by default on an H200.
Writes benchmarks/results/gpu_fused.json, which tests/test_gpu_instructions.py reads. It needs some minutes and no GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks/, where the package gpu is, in place of this folder

from gpu.instructions import GROUP_SIZE, SIZE, compile_product, name_of
from gpu.occupancy import ROWS, spilling

RESULTS = Path(__file__).parents[1] / "results" / "gpu_fused.json"
TARGET = "sm_90"
DTYPES = (torch.float16, torch.bfloat16)


def records() -> Iterator[dict[str, object]]:
    """One for each dtype of x, bits and rows, with the instructions of the main loop for each weight of all three."""
    for dtype in DTYPES:
        for bits in range(1, 9):
            for rows in ROWS:
                found = {
                    "plain": compile_product(TARGET, bits, rows, dtype),
                    "siblings": compile_product(TARGET, bits, rows, dtype, matrices=3),
                    "gate": compile_product(TARGET, bits, rows, dtype, matrices=2, gated=True),
                }
                record: dict[str, object] = {"x": name_of(dtype), "bits": bits, "rows": rows}
                for name, (kernel, weights) in found.items():
                    record[name] = {"per_weight": round(len(kernel.main_loop) / weights, 3), **spilling(kernel)}
                yield record


def main() -> None:
    found = []
    for record in records():
        found.append(record)
        print(record, flush=True)
    setting = {"triton": triton.__version__, "target": TARGET, "n": SIZE, "k": SIZE, "group_size": GROUP_SIZE}
    lines = ",\n".join("    " + json.dumps(record) for record in found)
    RESULTS.write_text(f'{{\n  "setting": {json.dumps(setting)},\n  "records": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
