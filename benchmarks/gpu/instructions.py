"""What the products' kernels compile to for GPUs that need not be there: resources, and instructions for each weight.

``python benchmarks/gpu/instructions.py`` writes benchmarks/results/gpu_instructions.json, which tests/test_gpu_instructions.py
compares with.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton

from kbit_inductor.kernels.layout import WORD_COLUMNS, group_count
from kbit_inductor.kernels.triton import aot, launch, linear, quantize
from kbit_inductor.kernels.triton import bits as counting
from kbit_inductor.kernels.triton.config import Config, Device, default_config, held_dtype
from kbit_inductor.kernels.triton.epilogue import NOTHING, Epilogue
from kbit_inductor.kernels.words import WordLayout

RESULTS = Path(__file__).parents[1] / "results" / "gpu_instructions.json"
SIZE = 8192
GROUP_SIZE = 128
DEVICES = {
    "sm_80": Device(108, shared_memory=163 << 10),  # A100
    "sm_86": Device(84, shared_memory=99 << 10),  # RTX 3090
    "sm_90": Device(132, wgmma=True, shared_memory=227 << 10, takes_fp8=True),  # H100, H200
    "sm_100": Device(148, shared_memory=227 << 10, takes_fp8=True),  # B200
    "gfx942": Device(304, least_rows=16, shared_memory=64 << 10, copies_words=False),  # MI300X
}
ROWS = (1, 256)
FP8 = torch.float8_e4m3fn
ROUNDED = (torch.int8, FP8)
COUNTED = ("sm_90",)  # for which activations other than float16 are compiled too
ACTIVATIONS = {
    torch.float16: (tuple(DEVICES), ROWS), torch.bfloat16: (COUNTED, ROWS[:1]), torch.int8: (COUNTED, ROWS),
    FP8: (tuple(target for target, device in DEVICES.items() if device.takes_fp8), ROWS),
}  # fmt: skip
"""For which targets those of a dtype are compiled, and of how many rows."""


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
    matrices: int = 1,
    gated: bool = False,
) -> tuple[aot.CompiledKernel, float]:
    """The kernel that a product of ``rows`` rows launches, and the weights of a thread in one pass of its main loop.

    It reads activations of ``dtype``; those that are of :data:`ROUNDED` were float16.
    """
    layout, result = WordLayout.of(bits, k, group_size), torch.float16 if dtype in ROUNDED else dtype
    config = config or default_config(rows, n * matrices, layout, dtype, DEVICES[target])
    with torch.device("meta"):
        words = torch.empty(n, layout.row_words, dtype=torch.int16)
        scale = torch.empty(group_count(k, group_size), n, dtype=torch.float16)
        levels = torch.empty(2**bits, dtype=torch.uint8) if codebook else None
        out = torch.empty(rows, n if gated else n * matrices, dtype=result)
        bias = None if symmetric else torch.empty(n, dtype=result)
        matrix = launch.Matrix(words, scale, None if symmetric else scale, torch.empty(1), levels, bias)
        if dtype in ROUNDED:
            held = held_dtype(dtype, config, bits, DEVICES[target].takes_fp8)
            x = quantize.empty_activations(rows, layout, launch.span_pieces(layout, config), torch.device("meta"), held)
        else:
            x = launch.activations(torch.empty(rows, k, dtype=dtype), layout, config, launch.NOT_ROUNDED)
        ptx = not target.startswith("gfx")
        behind = Epilogue("silu", gated=True) if gated else NOTHING
        arguments = linear.launch_arguments(x, layout, [matrix] * matrices, behind, out, config, ptx)
    kernel = aot.compile_ahead(linear.linear_kernel, arguments, target)
    threads = config.num_warps * aot.TARGETS[target].warp_size
    return kernel, config.block_n * config.steps * layout.piece / threads


def compile_counting(target: str, bits: int, activation_bits: int) -> tuple[aot.CompiledKernel, float]:
    """The kernel that counts bits for one row, and the weights of a thread in one pass of its main loop."""
    words = SIZE // WORD_COLUMNS
    with torch.device("meta"):
        vectors, step = torch.empty(activation_bits, 1, words, dtype=torch.int32), torch.empty(1, words)
        planes, scale = torch.empty(bits, SIZE, words, dtype=torch.int32), torch.empty(SIZE, SIZE // GROUP_SIZE).half()
        packed = (planes, scale, scale, torch.empty(1))
        arguments = counting.launch_arguments(
            vectors, step, step.int(), *packed, None, GROUP_SIZE, torch.empty(1, SIZE).half(), True
        )
    kernel = aot.compile_ahead(counting.bits_kernel, arguments, target)
    # The compiler unrolls the loop as it likes: each word of a plane is counted once for each bit of an activation, and where there
    # is only one, those of x are counted too, in every thread as many as it has words of a plane.
    return kernel, kernel.main_loop.count("POPC") * WORD_COLUMNS / (bits * activation_bits + (activation_bits == 1))


def name_of(dtype: torch.dtype) -> str:
    """``"float16"``."""
    return str(dtype).removeprefix("torch.")


def describe(kernel: aot.CompiledKernel, weights: float) -> dict[str, object]:
    record: dict[str, object] = {"registers": kernel.registers, "spill_bytes": kernel.spill_bytes}
    loop = Counter(kernel.main_loop)
    record |= {"weights": weights, "per_weight": round(loop.total() / weights, 3)}
    if "cubin" in kernel.asm:
        record["guarded"] = kernel.guarded_accesses
    return record | {"kinds": dict(loop.most_common())}


def records(targets: Sequence[str]) -> Iterator[dict[str, object]]:
    """Every product of float16, those of other activations for some targets, and of a shape that nothing divides for one."""
    for target in targets:
        for dtype, (those, counts) in ACTIVATIONS.items():
            for rows in counts if target in those else ():
                for bits in range(1, 9):
                    kernel = compile_product(target, bits, rows, dtype)
                    yield {"target": target, "x": name_of(dtype), "bits": bits, "rows": rows} | describe(*kernel)
        if target == "sm_90":
            for rows in ROWS:
                kernel = compile_product(target, 4, rows, n=SIZE - 1, k=SIZE - 2)
                yield {"target": target, "x": "float16", "bits": 4, "rows": rows, "ragged": True} | describe(*kernel)
        if target in COUNTED:
            for bits, activation_bits in ((1, 1), (1, 4), (2, 2)):
                kernel = compile_counting(target, bits, activation_bits)
                yield {"target": target, "x": f"{activation_bits} bits", "bits": bits, "rows": 1} | describe(*kernel)


def main() -> None:
    """Arguments are targets, to compile for those alone, which Triton then need not do again, and write nothing."""
    found = []
    for record in records(sys.argv[1:] or list(DEVICES)):
        found.append(record)
        print(*(f"{name} {value}" for name, value in record.items() if name != "kinds"), flush=True)
    if sys.argv[1:]:
        return
    setting = {"triton": triton.__version__, "n": SIZE, "k": SIZE, "group_size": GROUP_SIZE, "symmetric": False}
    # One record a line, so that a change of one shows.
    lines = ",\n".join("    " + json.dumps(record) for record in found)
    RESULTS.write_text(f'{{\n  "setting": {json.dumps(setting)},\n  "records": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
