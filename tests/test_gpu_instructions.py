"""What the products' kernels compile to for GPUs, against the table that is checked in."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from gpu import fused
from gpu.instructions import DEVICES, RESULTS, ROWS, compile_product

TABLE = json.loads(RESULTS.read_text())
KEY = ("target", "x", "bits", "rows")
ALL = {tuple(record[name] for name in KEY): record for record in TABLE["records"] if "ragged" not in record}
RECORDS = {(target, bits, rows): record for (target, x, bits, rows), record in ALL.items() if x == "float16"}
RAGGED = [record for record in TABLE["records"] if "ragged" in record]
NVIDIA = [target for target in DEVICES if target.startswith("sm")]
FUSED = json.loads(fused.RESULTS.read_text())["records"]
# What an H200 can execute while it reads a weight of so many bits, unpacking, scaling and multiplying together.
MOST_PER_WEIGHT = {4: 3.5, 3: 2.6, 2: 1.8}
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled")


def test_the_table_has_every_configuration_and_none_spills():
    assert set(RECORDS) == {(target, bits, rows) for target in DEVICES for bits in range(1, 9) for rows in ROWS}
    spilled = {key: record["spill_bytes"] for key, record in ALL.items() if record["spill_bytes"]}
    assert spilled == {}


@pytest.mark.parametrize("bits", MOST_PER_WEIGHT)
@pytest.mark.parametrize("target", NVIDIA)
def test_decoding_takes_no_more_instructions_than_reading_allows(target, bits):
    assert RECORDS[target, bits, 1]["per_weight"] <= MOST_PER_WEIGHT[bits]


def test_what_divides_is_not_guarded():
    """No load or store has a mask where every block is full; where none is, they have."""
    full = [record for record in TABLE["records"] if "guarded" in record and "ragged" not in record and record["rows"] == 256]
    assert len(full) > 30 and {record["guarded"] for record in full} == {0}
    assert len(RAGGED) == len(ROWS) and all(record["guarded"] > 0 for record in RAGGED)


@pytest.mark.parametrize("bits", MOST_PER_WEIGHT)
def test_bfloat16_takes_no_more_than_reading_allows_but_at_2_bits(bits):
    """There it takes a few more, since its mantissa has room for three of the four places of a code in a byte."""
    assert ALL["sm_90", "bfloat16", bits, 1]["per_weight"] <= (1.9 if bits == 2 else MOST_PER_WEIGHT[bits])


@pytest.mark.parametrize(("target", "product"), [("sm_90", "QGMMA"), ("sm_100", "UTCQMMA")])
def test_8_bit_floats_are_multiplied_as_such_where_that_takes_less(target: str, product: str) -> None:
    """By short codes in front of many rows. Else float16 holds them, and no loop makes bytes of codes or float16 of bytes."""
    for bits in range(1, 9):
        one, many = (ALL[target, "float8_e4m3fn", bits, rows] for rows in ROWS)
        assert one["per_weight"] <= 1.15 * RECORDS[target, bits, 1]["per_weight"] and "F2FP" not in one["kinds"]
        assert any(kind == product for kind in many["kinds"]) == (bits <= 4), bits


def test_instructions_of_an_amd_gpu_are_counted():
    """Those of a wavefront; products are matrix instructions, and nothing is moved to a code but by shift, and, and or."""
    for bits in range(1, 9):
        kinds = RECORDS["gfx942", bits, 1]["kinds"]
        assert any(kind.startswith("v_mfma") for kind in kinds) and not any("scratch" in kind for kind in kinds)


def test_counting_takes_fewer_instructions_than_multiplying():
    """At 1 bit, where an H200 can execute 0.875 instructions while it reads a weight."""
    assert ALL["sm_90", "1 bits", 1, 1]["per_weight"] <= 0.875
    assert ALL["sm_90", "4 bits", 1, 1]["per_weight"] <= 1 < 2 < ALL["sm_90", "int8", 1, 1]["per_weight"]


@compiled
@pytest.mark.parametrize(("target", "bits", "rows"), [("sm_80", 4, 1), ("sm_90", 2, 1), ("sm_90", 4, 256)])
def test_the_table_is_what_is_compiled(target, bits, rows):
    kernel, weights = compile_product(target, bits, rows)
    record = RECORDS[target, bits, rows]
    if triton.__version__ == TABLE["setting"]["triton"]:
        assert (kernel.registers, len(kernel.main_loop)) == (record["registers"], sum(record["kinds"].values()))
    else:  # another compiler, other instructions
        assert len(kernel.main_loop) / weights <= 1.25 * record["per_weight"]
    assert kernel.spill_bytes == 0
    assert set(re.findall(r"LDGSTS\S*", kernel.sass)) == {"LDGSTS.E.BYPASS.128"}
    assert ("HGMMA" in kernel.main_loop) == (rows == 256 and target == "sm_90")


def test_what_is_fused_takes_the_loop_of_a_plain_product():
    """Of every default configuration on sm_90: siblings and a gate with its factor, a twentieth more at most for nearly all."""
    shares = [
        (each[kind]["per_weight"] / each["plain"]["per_weight"], each, kind) for each in FUSED for kind in ("siblings", "gate")
    ]
    assert len(shares) == 2 * 2 * 8 * 5 and max(share for share, *_ in shares) < 1.1
    assert sorted(share for share, *_ in shares)[len(shares) // 2] < 1.01
    spilling = [each[kind] for _, each, kind in shares if each[kind]["spill_bytes"]]
    assert len(spilling) <= 6 and all(each["spilling_in_loop"] == 0 and each["spill_bytes"] <= 40 for each in spilling)


@compiled
@pytest.mark.parametrize("more", [{"matrices": 3}, {"matrices": 2, "gated": True}], ids=["siblings", "gated"])
def test_several_matrices_add_nothing_to_the_loop(more):
    kernel, weights = compile_product("sm_80", 4, 1, **more)
    assert kernel.spill_bytes == 0 and kernel.guarded_accesses == 0
    assert len(kernel.main_loop) / weights <= 1.05 * RECORDS["sm_80", 4, 1]["per_weight"]
