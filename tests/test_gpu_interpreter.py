"""What the interpreter has run (benchmarks/gpu/interpreter.py): every kernel at every number of bits and with every dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu_interpreter.json"
FAMILIES = (
    "products", "products, columns split", "products, activations rounded", "grouped products", "batched products", "counted bits",
    "unpacking to float", "embedding",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dtype_and_number_of_bits_was_run(family: str) -> None:
    found = json.loads(RESULTS.read_text())["families"][family]
    wanted = {(family, dtype, bits) for dtype in ("float16", "bfloat16", "float32") for bits in range(1, 9)}
    assert {(family, dtype, int(bits)) for dtype, counts in found.items() for bits in counts} >= wanted
