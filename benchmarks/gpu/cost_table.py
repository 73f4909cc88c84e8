"""What the cost model needs of the compiled kernels: ``python benchmarks/gpu/cost_table.py``.

From benchmarks/results/gpu_instructions.json to lowering/cost/instructions.json: registers, and the instructions of the main loop
for each weight but for those that the model counts itself, the products and the scaling of sums. tests/test_cost_model.py compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parents[1] / "results" / "gpu_instructions.json"
TABLE = Path(__file__).parents[2] / "lowering" / "cost" / "instructions.json"
LOOPS = {1: "unrolled", 256: "stepped"}  # rows of x: the loop of the kernel that is launched for them
COUNTED = ("HMMA", "HGMMA", "FFMA")


def table() -> dict[str, Any]:
    """By target, loop and bits: instructions for each weight, and registers of a thread."""
    found: dict[str, Any] = {}
    records = json.loads(MEASURED.read_text())["records"]
    for record in (each for each in records if each["x"] == "float16" and "ragged" not in each):
        row = {"registers": record["registers"]}
        if "kinds" in record:
            rest = sum(count for kind, count in record["kinds"].items() if kind not in COUNTED)
            row["per_weight"] = round(rest / record["weights"], 3)
        found.setdefault(record["target"], {}).setdefault(LOOPS[record["rows"]], {})[str(record["bits"])] = row
    return found


def main() -> None:
    lines = [
        f'  "{target}": {{\n'
        + ",\n".join(f'    "{loop}": {{\n' + _rows(rows) + "\n    }" for loop, rows in loops.items())
        + "\n  }"
        for target, loops in table().items()
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _rows(rows: dict[str, Any]) -> str:
    return ",\n".join(f'      "{bits}": {json.dumps(row)}' for bits, row in rows.items())


if __name__ == "__main__":
    main()
