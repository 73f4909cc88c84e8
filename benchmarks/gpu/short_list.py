"""What the cost model's short lists compile to: registers, spills and instructions for each weight of the main loop.

``python benchmarks/gpu/short_list.py`` writes benchmarks/results/gpu_short_list.json, which tests/test_cost_model.py reads. It
needs a few minutes and no GPU.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import triton
from instructions import GROUP_SIZE, SIZE, compile_product

from kbit_inductor.lowering.cost.device import find
from kbit_inductor.lowering.cost.short_list import short_list
from kbit_inductor.lowering.problem import Problem

RESULTS = Path(__file__).parents[1] / "results" / "gpu_short_list.json"
DEVICE = "H200"
ROWS = (1, 64, 256)
BITS = (3, 4)


def main() -> None:
    device = find(DEVICE)
    assert device is not None
    records = []
    for bits in BITS:
        problem = Problem("linear", "cuda", torch.float16, SIZE, SIZE, bits, GROUP_SIZE)
        for m in ROWS:
            for each in short_list(problem, m, device):
                kernel, weights = compile_product(device.target, bits, m, config=each.config)
                found = {"registers": kernel.registers, "spill_bytes": kernel.spill_bytes}
                found["per_weight"] = round(len(kernel.main_loop) / weights, 3)
                records.append({"bits": bits, "m": m, **found, "config": dataclasses.asdict(each.config)})
                print(records[-1], flush=True)
    setting = {"device": DEVICE, "triton": triton.__version__, "n": SIZE, "k": SIZE, "group_size": GROUP_SIZE, "dtype": "float16"}
    lines = ",\n".join("    " + json.dumps(record) for record in records)
    RESULTS.write_text(f'{{\n  "setting": {json.dumps(setting)},\n  "records": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
