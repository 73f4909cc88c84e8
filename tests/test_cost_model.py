"""The cost model against published figures, against a simulated GPU, and against itself."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated_gpu import simulate
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.kernels.layout import FP8
from kbit_inductor.kernels.triton.config import LEAST_STEPS, Config
from kbit_inductor.kernels.words import WordLayout
from kbit_inductor.lowering.cost import measure, products, triton_bits, triton_linear, triton_ways
from kbit_inductor.lowering.cost.crossover import LONGEST, crossovers
from kbit_inductor.lowering.cost.device import DeviceRecord, find, shipped
from kbit_inductor.lowering.cost.expected import expected, range_table
from kbit_inductor.lowering.cost.measure import measure_cpu
from kbit_inductor.lowering.cost.short_list import LENGTH, candidates, short_list
from kbit_inductor.lowering.cost.time import estimate, seconds
from kbit_inductor.lowering.cost.work import BITS, K, M, N, Work
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import KERNELS, Kernel, choose

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from gpu import cost_table

BITS_TRIED = (2, 3, 4, 8)
FP8_DTYPE = torch.float8_e4m3fn
# An H200, 8192 x 8192, groups of 128 with a float16 scale and zero, in µs: what no kernel can go below.
ROOFLINE = {
    1: (4.4, 6.4, 8.3, 16.1), 16: (4.5, 6.5, 8.4, 16.2), 64: (10.9, 10.9, 10.9, 16.6), 256: (43.5,) * 4, 4096: (696,) * 4,
}  # fmt: skip
# Published times of single launches there: cuBLAS float16, then the best of others' kernels at 2, 3, 4 and 8 bits.
PUBLISHED = {
    1: (50.1, 19.4, 22.2, 22.4, 31.2), 16: (51.0, 20.2, 23.2, 22.9, 31.9), 64: (45.3, 26.4, 29.1, 28.1, 33.9),
    128: (45.7, 35.3, 36.1, 36.0, 38.2), 256: (56.6, 58.0, 59.2, 58.8, 60.2), 4096: (824, 762, 798, 802, 792),
}  # fmt: skip
SINGLE_LAUNCH = 14e-6  # what those have more than their bytes at M = 1: 22.4 µs for 8.3 µs of bytes at 4 bits
(TRITON,) = (kernel for kernel in KERNELS if kernel.name == "triton")


def record(name: str) -> DeviceRecord:
    found = find(name)
    assert found is not None
    return found


H200 = record("h200")


def problem(bits: int, n: int = 8192, k: int = 8192, group_size: int = 128, dtype: torch.dtype = torch.float16) -> Problem:
    return Problem("linear", "cuda", dtype, n, k, bits, group_size)


def experts(of: Problem, count: int) -> Problem:
    """A batch of matrices, each as that of ``of``."""
    return dataclasses.replace(of, family="grouped_linear", matrices=count)


def microseconds(work: Work, m: int, device: DeviceRecord = H200, bits: int = 4) -> float:
    return 1e6 * float(seconds(products.bound(work, problem(bits)), device, m))


@pytest.mark.parametrize("m", ROOFLINE)
def test_the_roofline_is_the_published_one(m: int) -> None:
    found = [microseconds(products.ROOFLINE, m, bits=bits) for bits in BITS_TRIED]
    # Published with the bytes of a weight alone where products are the bound.
    assert found == pytest.approx(ROOFLINE[m], rel=0.05)


UNPACKING_KERNEL = dataclasses.replace(products.ROOFLINE, launches=1, unhidden=Work(bytes=0).unhidden)
SINGLE = dataclasses.replace(H200, launch=SINGLE_LAUNCH)


@pytest.mark.parametrize("m", PUBLISHED)
def test_published_kernels_take_what_the_model_says(m: int) -> None:
    """With one constant for all, the time of a launch. A sixth is what those kernels differ by."""
    found = [microseconds(products.FLOAT_PRODUCT, m, SINGLE)]
    found += [microseconds(UNPACKING_KERNEL, m, SINGLE, bits) for bits in BITS_TRIED]
    assert found == pytest.approx(PUBLISHED[m], rel=1 / 6)


def test_published_kernels_fall_behind_cublas_where_the_model_says() -> None:
    for column, bits in enumerate(BITS_TRIED, 1):
        works = {"packed": UNPACKING_KERNEL, "float": products.FLOAT_PRODUCT}
        table = crossovers({name: [products.bound(work, problem(bits))] for name, work in works.items()}, SINGLE)
        for m, row in PUBLISHED.items():
            if m < 4096:  # there cuBLAS itself is far from its bound
                assert table.at(m) == ("packed" if row[column] < row[0] else "float"), (bits, m)
        times = [microseconds(UNPACKING_KERNEL, m, SINGLE, bits) for m in PUBLISHED]
        assert times == sorted(times)


sizes = st.integers(1, 20_000)


@given(
    bits=st.integers(1, 8), n=sizes, k=sizes, m=sizes, group=st.sampled_from([16, 32, 64, 128, 100, 20_000]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), device=st.sampled_from(shipped()),
)  # fmt: skip
def test_no_estimate_is_below_the_roofline(bits, n, k, m, group, dtype, device):
    asked = problem(bits, n, k, min(group, k), dtype)
    least = float(seconds(products.bound(products.ROOFLINE, asked), device, m))
    found = expected(choose(asked).kernel, asked, device, m)
    assert math.isfinite(found.seconds) and found.seconds >= least
    assert dict(found.parts)[found.bound] == max(dict(found.parts).values())


@pytest.mark.parametrize("m", [1, 16, 128])
def test_the_best_of_a_simulated_gpu_is_in_the_short_list(m: int) -> None:
    """On simulated times: none have been recorded on a GPU (test_tuner.py has the test for such)."""
    shapes = [("h200", 4, 2048, 4096), ("a100-40gb", 2, 4096, 2048), ("l4", 3, 1024, 5120), ("mi300x", 4, 2048, 4096)]
    for name, bits, n, k in [*shapes, ("h200", 4, 8192, 8192)][: 4 if m == 128 else 5]:
        device, asked = record(name), problem(bits, n, k)
        listed = [each.config for each in short_list(asked, m, device)]
        assert len(listed) == len(set(listed)) == LENGTH
        times = {config: simulate(asked, m, config, device, luck=0) for config in candidates(asked, m, device)}
        assert min(times[config] for config in listed) <= min(times.values()) * (1 + 1e-9)  # several may be equally fast


def test_the_short_list_has_the_default_and_only_what_fits() -> None:
    for device in shipped():
        for m, dtype in ((1, torch.float16), (17, torch.bfloat16), (300, torch.float32)):
            asked = problem(5, 1000, 3000, 64, dtype)
            listed = short_list(asked, m, device)
            assert listed == short_list(asked, m, device) and 1 <= len(listed) <= LENGTH
            assert [each.seconds for each in listed] == sorted(each.seconds for each in listed)
            usual = triton_linear.default(asked, m, device)
            for config in {each.config for each in listed} - {usual}:
                needed = triton_linear.resources(asked, config, device)
                assert needed.registers <= triton_linear.MOST_REGISTERS and needed.shared <= device.shared_memory
            assert usual in [each.config for each in listed] and usual in set(candidates(asked, m, device))


@pytest.mark.parametrize("device", shipped(), ids=lambda device: device.name)
def test_columns_are_split_where_tiles_do_not_fill_a_gpu(device: DeviceRecord) -> None:
    """By default, of any number of rows: hardly ever to a loss by the model, and to half the time of a small weight."""
    gained = []
    for (n, k), bits, m in itertools.product(((8192, 8192), (4096, 4096), (1000, 4096)), (3, 4), (1, 16, 17, 64, 128, 512)):
        asked = problem(bits, n, k)
        config = triton_linear.default(asked, m, device)
        works = [triton_linear.linear(asked, each, device) for each in (config, dataclasses.replace(config, split_k=1))]
        split, whole = (float(seconds(work, device, m)) for work in works)
        gained.append(whole / split)
        assert split <= 1.1 * whole, (n, k, bits, m, config)
        assert config.split_k * config.steps * LEAST_STEPS <= max(WordLayout.of(bits, k, 128).pieces, config.steps * LEAST_STEPS)
    assert max(gained) > 2 and min(gained) > 0.9


def test_a_range_table_has_the_fastest_at_every_m() -> None:
    unpacked = Kernel(
        "unpacked",
        "_x",
        lambda _: None,
        lambda _: 0.0,
        "words",
        lambda asked, _: [products.bound(products.UNPACKED_PRODUCT, asked)],
    )
    refused = Kernel("refused", "_x", lambda _: "no", lambda _: 0.0)
    asked = problem(4, dtype=torch.float32)  # of 16 bits, the Triton kernel itself unpacks from many rows on
    table = range_table([TRITON, unpacked, refused], asked, H200)
    assert table.names == ("triton", "unpacked") and 64 < table.starts[1] < 4096
    for m in (1, 2, 63, table.starts[1] - 1, table.starts[1], 8192):
        first, second = (expected(kernel, asked, H200, m).seconds for kernel in (TRITON, unpacked))
        assert table.at(m) == ("triton" if first <= second else "unpacked")
    assert table.at(0) == "triton" and table.at(10**6) == "unpacked"
    assert str(table) == f"M 1..{table.starts[1] - 1}: triton, M >= {table.starts[1]}: unpacked"


@pytest.mark.parametrize("device", [each.name for each in shipped()])
def test_a_weight_is_unpacked_from_where_that_is_always_faster(device: str) -> None:
    for bits, n, k in ((4, 8192, 8192), (2, 4096, 14336), (8, 1024, 4096)):
        asked, gpu = problem(bits, n, k), record(device)
        alone = [work for work in triton_ways.works(asked, gpu) if not work.way]
        unpacked = [products.bound(products.UNPACKED_PRODUCT, asked)]
        first = triton_ways.float_rows(asked, gpu)
        assert first is not None and triton_ways.LEAST_FLOAT_ROWS <= first < LONGEST
        for m in (first, first + 1, 2 * first, LONGEST):
            assert estimate(unpacked, gpu, m).seconds < estimate(alone, gpu, m).seconds
            assert expected(TRITON, asked, gpu, m) == estimate(unpacked, gpu, m)
        if first > triton_ways.LEAST_FLOAT_ROWS:
            assert estimate(unpacked, gpu, first - 1).seconds >= estimate(alone, gpu, first - 1).seconds
            assert expected(TRITON, asked, gpu, first - 1) == estimate(alone, gpu, first - 1)
        table = range_table([TRITON], asked, gpu)
        assert (table.starts, table.names) == ((1, first), ("triton", f"triton ({products.UNPACKED_FROM.way})"))


def test_what_is_not_of_16_bits_is_never_unpacked() -> None:
    for asked in (problem(4, dtype=torch.float32), dataclasses.replace(problem(4), activation_bits=8), experts(problem(4), 8)):
        assert not any(work.way for work in triton_ways.works(asked, H200))


def test_a_kernel_without_an_expression_takes_its_cost() -> None:
    plain = Kernel("plain", "_x", lambda _: None, lambda asked: 10 * asked.packed_bytes)
    found = expected(plain, problem(4), H200, 1)
    assert found.bound == "memory" and found.seconds == pytest.approx(10 * problem(4).packed_bytes / H200.bandwidth, rel=0.1)


def test_work_is_what_its_expressions_say() -> None:
    work = Work(bytes=N * K * BITS / 8 + 2 * M * K, products=2 * M * N * K)
    bound = work.at(N=64, K=32, bits=4)
    assert bound.expressions()["bytes"] == 1024 + 64 * M
    assert bound.quantities(np.array([1, 3])).products.tolist() == [2 * 64 * 32, 6 * 64 * 32]
    assert estimate([bound], H200, 1).seconds < estimate([dataclasses.replace(bound, launches=2)], H200, 1).seconds
    with pytest.raises(KeyError):
        work.quantities(1)


RECORDED = json.loads(cost_table.MEASURED.read_text())["records"]
COUNTED = [each for each in RECORDED if each["target"] == "sm_90" and each["x"] in cost_table.ACTIVATIONS and "ragged" not in each]
COUNTING = [each for each in RECORDED if each["x"].endswith(" bits")]


def test_instructions_are_those_that_were_counted() -> None:
    assert json.loads(triton_linear.TABLE.read_text()) == cost_table.table()
    assert json.loads(triton_linear.LAUNCHED.read_text()) == cost_table.registers()


@pytest.mark.parametrize("record_", COUNTED, ids=lambda each: f"{each['x']}-{each['bits']}-{each['rows']}")
def test_work_has_the_instructions_of_the_compiled_loop(record_: dict[str, Any]) -> None:
    """For every kind of activation, at the configurations that were compiled: products, scaling and all."""
    x = getattr(torch, record_["x"])
    rounding = {"activation_bits": {torch.int8: 8, FP8_DTYPE: FP8}[x]} if x.itemsize == 1 else {"dtype": x}
    asked, m = dataclasses.replace(problem(record_["bits"]), **rounding), record_["rows"]
    config = triton_linear.default(asked, m, H200)
    work = triton_linear.linear(asked, config, H200)
    issued = float((work.then or work).quantities(m).instructions) / (asked.rows * asked.columns * math.ceil(m / config.block_m))
    # A few that are neither products nor scaling are of the same kinds.
    assert issued == pytest.approx(record_["per_weight"], rel=0.12)


@pytest.mark.parametrize("record_", COUNTING, ids=lambda each: f"{each['x']}-{each['bits']}")
def test_counting_has_the_instructions_of_the_compiled_loop(record_: dict[str, Any]) -> None:
    pairs = record_["bits"] * (bits := int(record_["x"].split()[0]))
    words = record_["weights"] / triton_bits.WORD
    counts = record_["kinds"]["POPC"] / words
    rest = sum(record_["kinds"].values()) / words - counts
    # x is counted by every program, which shares that among its rows of the weight.
    assert counts == pairs + (record_["bits"] if bits == 1 else 0)
    assert triton_bits.FIXED + triton_bits.PAIR * pairs == pytest.approx(rest, rel=0.1)


def test_what_stands_before_a_product_has_the_instructions_of_the_compiled_kernel() -> None:
    """Unpacking to float, rounding and cutting activations into bits, none of which loops."""
    aot = pytest.importorskip("kbit_inductor.kernels.triton.aot", reason="Triton is not installed")
    from kbit_inductor.kernels.triton import bits, dequantize, quantize

    layout, n = WordLayout.of(4, 4096, 128), 4096
    with torch.device("meta"):
        x, out, scale = torch.empty(5, 4096).half(), torch.empty(n, 4096).half(), torch.empty(32, n).half()
        words, vectors = torch.empty(n, layout.row_words, dtype=torch.int16), torch.empty(4, 5, 128, dtype=torch.int32)
        rounded, steps = quantize.empty_activations(5, layout, 2, torch.device("meta")), torch.empty(5, 128)
        unpacking = dequantize.launch_arguments(layout, words, scale, scale, torch.empty(1), None, out, True)
        rounding = quantize.launch_arguments(x, layout, 2, 8, rounded)
        slicing = bits.slice_arguments(x, vectors, steps, steps.int(), 128, 4)
        kernels = [
            (dequantize.dequantize_kernel, unpacking, 16 * 256, products.UNPACK_INSTRUCTIONS),
            (quantize.quantize_kernel, rounding, 8 * 128, triton_linear.ROUNDING_INSTRUCTIONS),
            (bits.slice_kernel, slicing, 8 * 128, triton_bits.SLICING),
        ]
    for kernel, arguments, values, told in kernels:
        instructions = re.findall(r";$", aot.compile_ahead(kernel, arguments, "sm_90").sass, re.MULTILINE)
        assert 128 * len(instructions) / values == pytest.approx(told, rel=0.15)  # of as many threads


@pytest.mark.parametrize("family", ["grouped_linear", "batched_linear"])
def test_a_batch_costs_what_its_matrices_cost(family: str) -> None:
    one = problem(4, 2048, 4096)
    batch = dataclasses.replace(one, family=family, matrices=8)
    for device in shipped():
        config = dataclasses.replace(triton_linear.default(one, 16, device), split_k=1)
        work, alone = (triton_linear.linear(asked, config, device) for asked in (batch, one))
        for rows in (1, 5, 100):  # of each matrix
            all_of_them, each = work.quantities(8 * rows), alone.quantities(rows)
            for name in ("bytes", "l2_bytes", "instructions", "products", "programs"):
                assert getattr(all_of_them, name) == pytest.approx(8 * getattr(each, name)), name
        assert work.quantities(3).programs == 3 * alone.quantities(1).programs  # a matrix that no row asks for is not read
        found = expected(TRITON, batch, device, 2).seconds
        assert expected(TRITON, one, device, 1).seconds <= found <= expected(TRITON, batch, device, 8).seconds
    assert triton_linear.linear(one, config, device) == triton_linear.linear(dataclasses.replace(one, matrices=1), config, device)


def test_rounded_activations_take_a_launch_and_half_the_matrix_time() -> None:
    rounded = dataclasses.replace(problem(4), activation_bits=8)
    config = triton_linear.default(rounded, 4096, H200)
    work, floats = (triton_linear.linear(asked, config, H200) for asked in (rounded, problem(4)))
    assert work.then is not None and floats.then is None
    products_of = [each.quantities(4096).products for each in (work.then, floats)]
    assert products_of[0] == pytest.approx(products_of[1] / H200.speedup(torch.int8))
    assert estimate([work], H200, 4096).parts[-1][1] >= 2 * H200.launch


def test_8_bit_floats_have_a_rate_of_their_own() -> None:
    """Where matrix units take them, and a code is one: else float16 holds them, as in front of few rows."""
    rtx, a100 = record("RTX-4090"), record("A100-80GB")
    assert (H200.speedup(FP8_DTYPE), rtx.speedup(torch.int8), rtx.speedup(FP8_DTYPE)) == pytest.approx((2, 4, 2), rel=1e-3)
    for bits, device, m, speedup in ((4, H200, 4096, 2), (5, H200, 4096, 1), (4, H200, 1, 1), (4, a100, 4096, 1), (4, rtx, 64, 2)):
        floats, rounded = problem(bits), dataclasses.replace(problem(bits), activation_bits=FP8)
        config = triton_linear.default(rounded, m, device)
        work = triton_linear.linear(rounded, dataclasses.replace(config, sums=True), device).then
        half = triton_linear.linear(floats, dataclasses.replace(config, sums=True), device)
        assert work is not None
        found = float(half.quantities(m).products) / float(work.quantities(m).products)
        assert found == pytest.approx(speedup, rel=1e-3), (bits, device.name, m)


def test_counting_wins_where_there_are_few_bits_and_few_rows() -> None:
    """At 1 bit, of which the other kernel takes twice what an H200 executes while it reads."""
    (counting,) = (kernel for kernel in KERNELS if kernel.name == "triton-bits")
    few = dataclasses.replace(problem(1), activation_bits=1)
    assert expected(counting, few, H200, 1).seconds < expected(TRITON, few, H200, 1).seconds
    assert expected(counting, few, H200, 256).seconds > expected(TRITON, few, H200, 256).seconds
    four = dataclasses.replace(problem(1), activation_bits=4)
    assert expected(counting, four, H200, 1).seconds > expected(counting, few, H200, 1).seconds


COMPILED = json.loads((Path(cost_table.MEASURED).parent / "gpu_short_list.json").read_text())


def test_short_lists_compile_without_spills_in_the_registers_assumed() -> None:
    assert {(record["bits"], record["m"]) for record in COMPILED["records"]} == {(b, m) for b in (3, 4) for m in (1, 64, 256)}
    for record in COMPILED["records"]:
        asked, config = problem(record["bits"]), Config(**record["config"])
        assumed = triton_linear.resources(asked, config, H200).registers
        issued = float(triton_linear.linear(asked, config, H200).quantities(record["m"]).instructions)
        per_weight = issued / (asked.rows * asked.columns * -(-record["m"] // config.block_m))
        # Half more would be half the programs on a multiprocessor, or half the speed of a kernel that instructions bound.
        assert record["spill_bytes"] == 0 and 2 / 3 < assumed / record["registers"] < 2, record  # too many is the safe side
        assert 2 / 3 < per_weight / record["per_weight"] < 3 / 2, (record, per_weight)


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"), ("NVIDIA L4", "L4"), ("NVIDIA GeForce RTX 4090", "RTX-4090"), ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA L40S", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H100 PCIe", None), ("a100", "A100-80GB"),
    ],
)  # fmt: skip
def test_devices_are_known_by_their_names(driver: str, name: str | None) -> None:
    found = find(driver)
    assert (found and found.name) == name


# Of each device: bits of its memory bus and Gbit/s of each, multiprocessors or compute units, and what one does in a clock, of
# 16-bit products with float32 sums, of int8 ones, and of e4m3 ones with float32 sums. From the makers' descriptions of the
# architecture, not from the records.
ARCHITECTURES = {
    "A100-80GB": (5120, 3.186, 108, 2048, 4096, 0), "A100-40GB": (5120, 2.43, 108, 2048, 4096, 0),
    "H100": (5120, 5.23, 132, 4096, 8192, 8192), "H200": (6144, 6.25, 132, 4096, 8192, 8192),
    "L4": (192, 12.5, 58, 1024, 2048, 2048), "RTX-4090": (384, 21, 128, 512, 2048, 1024), "MI300X": (8192, 5.2, 304, 2048, 4096, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_figures_are_those_of_the_architecture(name: str) -> None:
    found, (bus, rate, units, halves, integers, floats) = record(name), ARCHITECTURES[name]
    assert set(ARCHITECTURES) == {each.name for each in shipped()}
    assert found.multiprocessors == units
    assert found.peak_bandwidth == pytest.approx(bus * rate * 1e9 / 8, rel=0.005)
    assert found.peak_matrix_rate == pytest.approx(units * halves * found.clock, rel=0.005)
    assert found.peak_integer_rate == pytest.approx(units * integers * found.clock, rel=0.005)
    assert found.peak_fp8_rate == pytest.approx(units * floats * found.clock, rel=0.005)


@pytest.mark.parametrize(("capability", "target", "fp8"), [((8, 0), "sm_80", 0), ((8, 9), "sm_86", 2), ((12, 0), "sm_100", 2)])
def test_an_unknown_gpu_is_measured(
    capability: tuple[int, int], target: str, fp8: int, monkeypatch: pytest.MonkeyPatch, one_thread_without_grad: None
) -> None:
    """By a copy and by a product, each for a twentieth of a second; the rest its driver tells."""
    told = {
        "name": "NVIDIA L40S",
        "total_memory": 1 << 20,
        "multi_processor_count": 142,
        "L2_cache_size": 96 << 20,
        "warp_size": 32,
    }
    properties = SimpleNamespace(
        **told, major=capability[0], minor=capability[1], clock_rate=2_520_000, max_threads_per_multi_processor=1536,
        shared_memory_per_multiprocessor=100 << 10, regs_per_multiprocessor=65536,
    )  # fmt: skip
    times = iter([1e-6, 2e-3])
    for name, fake in {
        "get_device_properties": lambda device: properties, "get_device_name": lambda device: properties.name,
        "device": lambda device: contextlib.nullcontext(), "synchronize": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(measure, "_seconds", lambda call, synchronize: next(times))
    found = measure.measure_gpu(torch.device("cpu"))
    assert (found.bandwidth, found.matrix_rate) == (2 * (1 << 17) / 1e-6, 2 * 4096**3 / 2e-3)
    assert (found.target, found.multiprocessors, found.instruction_rate) == (target, 142, 142 * 128 * 2.52e9)
    assert found.speedup(FP8_DTYPE) == fp8 and 2 * measure.TIME_LIMIT < 1
    assert 0 < expected(TRITON, problem(4), found, 1).seconds < expected(TRITON, problem(4), found, 1024).seconds


def test_a_timing_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0.0, 0.004)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    calls: list[float] = []
    assert measure._seconds(lambda: calls.append(next(now))) == pytest.approx(0.008)
    assert calls[-1] <= measure.TIME_LIMIT + 0.012


def test_a_cpu_is_measured_in_under_a_second(one_thread_without_grad: None) -> None:
    start = time.thread_time()  # of this thread alone: others may keep the machine busy
    found = measure_cpu()
    assert time.thread_time() - start < 1
    assert found.type == "cpu" and 1e8 < found.bandwidth < 1e13 and 1e7 < found.instruction_rate < 1e14
    assert 0 < found.launch < 0.1 and found.unpacking >= 0
    asked = Problem("linear", "cpu", torch.float32, 4096, 4096, 4, 64)
    one, many = (expected(choose(asked).kernel, asked, found, m).seconds for m in (1, 128))
    assert 0 < one < many


def test_explain_tells_times_and_bounds() -> None:
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x = torch.randn(3, 512)
    torch._dynamo.mark_dynamic(x, 0)
    report = kbit.explain(model, x, config={"bits": 3}, device="h200")
    (first,) = report.layer("0").expected
    assert (first.device, first.m, first.kernel) == ("H200", 3, "triton")
    asked = dataclasses.replace(problem(3, 256, 512, 64, torch.float32), activation_bits=16)
    assert (first.seconds, first.bound) == (expected(TRITON, asked, H200, 3).seconds, expected(TRITON, asked, H200, 3).bound)
    assert report.seconds == sum(each.seconds for layer in report.layers for each in layer.expected)
    assert "  H200 by triton: " in str(report) and f"{1e6 * first.seconds:.3g} µs" in str(report).replace("\n", " ")
    assert kbit.explain(model, x).seconds == 0
    kbit.quantize_(model, {"bits": 3})
    assert [layer.expected[0].m for layer in kbit.explain(model, x, device="l4").layers] == [1, 1]


@pytest.mark.parametrize("device", ["h300", "cuda:77", "meta"])
def test_an_unknown_device_is_told(device: str) -> None:
    with pytest.raises(kbit.InvalidOptionError, match="H200, L4, RTX-4090"):
        kbit.explain(nn.Linear(64, 64), torch.randn(1, 64), device=device)
