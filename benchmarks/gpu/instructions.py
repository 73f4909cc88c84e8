"""What the products' kernels compile to for GPUs that need not be there: resources, and instructions for each weight.

``python benchmarks/gpu/instructions.py`` writes benchmarks/results/gpu_instructions.json, which tests/test_gpu_instructions.py
compares with.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
import triton

from kbit_inductor.kernels.layout import group_count
from kbit_inductor.kernels.triton import aot, linear
from kbit_inductor.kernels.triton.config import Config, Device, default_config
from kbit_inductor.kernels.words import WordLayout

RESULTS = Path(__file__).parents[1] / "results" / "gpu_instructions.json"
SIZE = 8192
GROUP_SIZE = 128
DEVICES = {
    "sm_80": Device(108),  # A100
    "sm_86": Device(84),  # RTX 3090
    "sm_90": Device(132, wgmma=True),  # H100, H200
    "sm_100": Device(148),  # B200
    "gfx942": Device(304, least_rows=16),  # MI300X
}
ROWS = (1, 256)


def compile_product(
    target: str,
    bits: int,
    rows: int,
    dtype: torch.dtype = torch.float16,
    n: int = SIZE,
    k: int = SIZE,
    group_size: int = GROUP_SIZE,
    symmetric: bool = False,
    codebook: bool = False,
    config: Config | None = None,
) -> tuple[aot.CompiledKernel, float]:
    """The kernel that a product of ``rows`` rows launches, and the weights of a thread in one pass of its main loop."""
    layout = WordLayout.of(bits, k, group_size)
    config = config or default_config(rows, n, layout, dtype, DEVICES[target])
    with torch.device("meta"):
        words = torch.empty(n, layout.row_words, dtype=torch.int16)
        scale = torch.empty(group_count(k, group_size), n, dtype=torch.float16)
        levels = torch.empty(2**bits, dtype=torch.uint8) if codebook else None
        x, out = torch.empty(rows, k, dtype=dtype), torch.empty(rows, n, dtype=dtype)
        bias = None if symmetric else torch.empty(n, dtype=dtype)
        grid = (scale, None if symmetric else scale, torch.empty(1))
        arguments = linear.launch_arguments(
            x, words, *grid, bias, bits, group_size, levels, "", None, None, out, config, ptx=not target.startswith("gfx")
        )
    kernel = aot.compile_ahead(linear.linear_kernel, arguments, target)
    threads = config.num_warps * aot.TARGETS[target].warp_size
    return kernel, config.block_n * config.steps * layout.piece / threads


def measure(target: str, bits: int, rows: int) -> dict[str, object]:
    kernel, weights = compile_product(target, bits, rows)
    record: dict[str, object] = {"target": target, "bits": bits, "rows": rows}
    record |= {"registers": kernel.registers, "spill_bytes": kernel.spill_bytes}
    if "cubin" in kernel.asm:
        loop = Counter(kernel.main_loop)
        record |= {"weights": weights, "per_weight": round(loop.total() / weights, 3), "kinds": dict(loop.most_common())}
    return record


def main() -> None:
    records = []
    for target in DEVICES:
        for rows in ROWS:
            for bits in range(1, 9):
                records.append(measure(target, bits, rows))
                print(*(f"{name} {value}" for name, value in records[-1].items() if name != "kinds"), flush=True)
    setting = {"triton": triton.__version__, "n": SIZE, "k": SIZE, "group_size": GROUP_SIZE, "dtype": "float16", "symmetric": False}
    # One record a line, so that a change of one shows.
    lines = ",\n".join("    " + json.dumps(record) for record in records)
    RESULTS.write_text(f'{{\n  "setting": {json.dumps(setting)},\n  "records": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
