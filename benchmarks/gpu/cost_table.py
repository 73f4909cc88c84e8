"""What the cost model needs of the compiled kernels: ``python benchmarks/gpu/cost_table.py``.

From benchmarks/results/gpu_instructions.json to lowering/cost/instructions.json: registers, and the instructions of the main loop
for each weight but for those that the model counts itself, the products and the scaling of sums. From gpu_occupancy.json to
lowering/cost/registers.json: those of every configuration that is launched by default. tests/test_cost_model.py compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kbit_inductor.kernels.triton.config import Config
from kbit_inductor.lowering.cost.triton_linear import name_of

MEASURED = Path(__file__).parents[1] / "results" / "gpu_instructions.json"
OCCUPANCY = MEASURED.with_name("gpu_occupancy.json")
TABLE = Path(__file__).parents[2] / "lowering" / "cost" / "instructions.json"
REGISTERS = TABLE.with_name("registers.json")
LOOPS = {1: "unrolled", 256: "stepped"}  # rows of x: the loop of the kernel that is launched for them
ACTIVATIONS = ("float16", "bfloat16", "int8", "float8_e4m3fn")
COUNTED = {"int8": ("IMMA", "IGMMA", "FFMA", "I2FP", "FMUL")}
COUNTED_OF_FLOATS = ("HMMA", "HGMMA", "QGMMA", "FFMA")
COUNTED_OF_AMD = ("v_mfma", "v_fma", "v_pk_fma")  # begin so


def table() -> dict[str, Any]:
    """By target, dtype of activations, loop and bits: instructions for each weight, and registers of a thread."""
    found: dict[str, Any] = {}
    records = json.loads(MEASURED.read_text())["records"]
    for record in (each for each in records if each["x"] in ACTIVATIONS and "ragged" not in each):
        row = {"registers": record["registers"]}
        if "kinds" in record:
            counted = COUNTED.get(record["x"], COUNTED_OF_FLOATS)
            kinds = record["kinds"].items()
            rest = sum(count for kind, count in kinds if kind not in counted and not kind.startswith(COUNTED_OF_AMD))
            row["per_weight"] = round(rest / record["weights"], 3)
        loops = found.setdefault(record["target"], {}).setdefault(record["x"], {})
        loops.setdefault(LOOPS[record["rows"]], {})[str(record["bits"])] = row
    return found


def registers() -> dict[str, Any]:
    """By target, dtype of activations, bits and :func:`name_of` a configuration."""
    found: dict[str, Any] = {}
    for record in json.loads(OCCUPANCY.read_text())["records"]:
        bits = found.setdefault(record["target"], {}).setdefault(record["x"], {}).setdefault(str(record["bits"]), {})
        bits[name_of(Config(**record["config"]))] = record["registers"]
    return found


def main() -> None:
    TABLE.write_text("{\n" + _nested(table(), 1) + "\n}\n")
    REGISTERS.write_text("{\n" + _nested(registers(), 1) + "\n}\n")


def _nested(found: dict[str, Any], depth: int) -> str:
    """As JSON with a row of the table on each line, so that a change of one shows."""
    indent = "  " * depth
    return ",\n".join(
        f'{indent}"{name}": {json.dumps(value)}'
        if not any(isinstance(each, dict) for each in value.values())
        else f'{indent}"{name}": {{\n{_nested(value, depth + 1)}\n{indent}}}'
        for name, value in found.items()
    )


if __name__ == "__main__":
    main()
