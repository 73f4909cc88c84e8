"""Products that count bits against our int8 kernel: ``python benchmarks/cpu/bits.py``.

For k bits of the weight and each number of rows of x: the int8 kernel, and counting at 1 to 4 bits of the activations, by turns.
Writes ``benchmarks/results/bits.json`` and prints ratios to the int8 kernel and to reading the bytes at the bandwidth of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # benchmarks/, where the package cpu is

import torch  # noqa: E402 (see above)
from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402

from cpu import ceilings, run, tables  # noqa: E402
from cpu.layers import COLD_BYTES, HOT_ROWS  # noqa: E402
from cpu.timing import Budget, Call, interleave, summary  # noqa: E402
from kbit_inductor.kernels.cpu import build  # noqa: E402
from kbit_inductor.kernels.layout import group_count  # noqa: E402
from kbit_inductor.lowering.registry import Problem, choose  # noqa: E402

RESULTS = run.REPOSITORY / "benchmarks" / "results" / "bits.json"
BITS = range(1, 9)
COUNTED = (1, 2, 3, 4)  # bits of the activations
INT8 = 8
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048, help="rows and columns of W (default: 2048)")
    parser.add_argument("--inputs", type=int, nargs="+", default=[1, 16, 128], help="rows of x (default: 1 16 128)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each k and number of rows of x (default: 1.5)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the results")
    options = parser.parse_args(arguments)
    results = measure(options.width, options.inputs, options.group_size, Budget(options.seconds))
    options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else run.WIDTH)
    for grid in grids(results):
        console.print(tables.drawn(grid))


@torch.no_grad()
def measure(width: int, inputs: Sequence[int], group_size: int, budget: Budget) -> Row:
    """``rows``: one for each k, number of rows of x and kernel, its median and ratios to the int8 kernel and to reading."""
    build.load()
    found = ceilings.measure(Budget(1), width=512)
    rows: list[Row] = []
    for bits in BITS:
        copies = {vectors: _copies(width, bits, group_size, vectors) for vectors in (False, True)}
        for count in inputs:
            rows += _rows(copies, bits, group_size, torch.randn(count, width), budget, ceilings.bandwidth(found))
    shape = {"width": width, "group_size": group_size, "isa": torch.ops.kbit.isa_cpu()}
    return {"machine": run.machine(), "ceilings": found, **shape, "rows": rows}


def _copies(width: int, bits: int, group_size: int, vectors: bool) -> list[Tensor]:
    """A weight of random codes, as often as together they do not fit the caches."""
    codes = torch.randint(0, 2**bits, (width, width), dtype=torch.uint8)
    scale = torch.ones(width, group_count(width, group_size), dtype=torch.float16)
    copies: list[Tensor] = []
    while sum(copy.nbytes for copy in copies) < COLD_BYTES:
        copies.append(torch.ops.kbit.tile_cpu(codes, scale, -scale, torch.ones(1), bits, group_size, None, vectors))
    return copies


def _calls(copies: Sequence[Tensor], x: Tensor, activation_bits: int) -> list[Call]:
    used = copies if x.size(0) < HOT_ROWS else copies[:1]
    return [partial(torch.ops.kbit.linear_cpu.default, x, copy, None, x.size(1), activation_bits) for copy in used]


def _rows(
    copies: dict[bool, list[Tensor]], bits: int, group_size: int, x: Tensor, budget: Budget, bandwidth: float | None
) -> Iterator[Row]:
    calls = {INT8: _calls(copies[False], x, INT8)} | {j: _calls(copies[True], x, j) for j in COUNTED}
    times = {j: summary(seconds) for j, seconds in interleave({str(j): call for j, call in calls.items()}, budget).items()}
    int8 = times[str(INT8)]["median"]
    for j in calls:
        nbytes = copies[j != INT8][0].nbytes
        problem = Problem("linear", "cpu", x.dtype, x.size(1), x.size(1), bits, group_size, activation_bits=j)
        seconds = times[str(j)]
        yield {
            "bits": bits,
            "activation_bits": j,
            "inputs": x.size(0),
            "kernel": "int8" if j == INT8 else "bits",
            "chosen": choose(problem).kernel.name,
            "bytes": nbytes,
            "seconds": seconds,
            "of_int8": seconds["median"] / int8,
            "of_reading": seconds["median"] / (nbytes / bandwidth) if bandwidth and x.size(0) < HOT_ROWS else None,
        }


def grids(results: Row) -> Iterator[tables.Grid]:
    """A table for each number of rows of x: a line for each k."""
    for count in dict.fromkeys(row["inputs"] for row in results["rows"]):
        rows = {(row["bits"], row["activation_bits"]): row for row in results["rows"] if row["inputs"] == count}
        lines = [[str(k), f"{1e6 * rows[k, INT8]['seconds']['median']:.0f}", *_cells(rows, k)] for k in BITS]
        head = ("bits", "int8, µs", *(part for j in COUNTED for part in (f"{j} bits, µs", "of int8", "of reading")))
        yield tables.Grid(f"W {results['width']}×{results['width']}, M={count}, {results['isa']}; * chosen", head, lines)


def _cells(rows: dict[tuple[int, int], Row], bits: int) -> Iterator[str]:
    for j in COUNTED:
        row = rows[bits, j]
        yield f"{1e6 * row['seconds']['median']:.0f}{'*' if row['chosen'] == 'bits' else ''}"
        yield f"{row['of_int8']:.2f}"
        yield f"{row['of_reading']:.2f}" if row["of_reading"] else tables.NONE


if __name__ == "__main__":
    main()
