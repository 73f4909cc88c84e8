"""The CPU benchmarks' parts on tiny layers and models: results that can be trusted, whatever they time. No time is asserted."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._dynamo.testing import CompileCounter

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from cpu import breakdown, ceilings, contender, layers, minilm, models, ours, peers, plots, run, tables, timing  # noqa: E402

compiles = pytest.mark.skipif("KBIT_TEST_BENCHMARKS" not in os.environ, reason="compiles for a minute: make test-benchmarks")
SHORT = timing.Budget(seconds=0.0, rounds=1, turn=0.0, rest=False)
# Relative error of y for weights from a normal distribution, with room for a peer's poorest grid: three halves of what it has.
ERRORS = {32: 1e-5, 16: 0.005, 8: 0.02, 7: 0.03, 6: 0.05, 5: 0.08, 4: 0.18, 3: 0.35, 2: 0.9, 1: 1.0}
PEERS = peers.contenders()
OURS = ours.contenders()


def weight(rows: int = 96, columns: int = 512) -> torch.Tensor:
    return torch.randn(rows, columns) / columns**0.5


def made(one: contender.Contender, of: torch.Tensor) -> contender.Copy:
    """A copy, unless the contender's library is not installed."""
    try:
        return one.load(of)()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("rows_of_x", [1, 5])
@pytest.mark.parametrize("one", [*PEERS, *OURS], ids=lambda one: one.name)
@torch.no_grad()
def test_contenders_compute_the_layer(one: contender.Contender, rows_of_x: int) -> None:
    w = weight()
    copy = made(one, w)
    assert contender.relative_error(copy, w, torch.randn(rows_of_x, w.size(1))) < ERRORS[one.bits]
    # Scales are at most a byte more for each weight of 8 bits and less, and none for floats.
    assert one.bits <= 8 * copy.nbytes / w.numel() <= one.bits + (0 if one.bits > 8 else 2)


@pytest.mark.parametrize("one", [*PEERS, *OURS[3::8]], ids=lambda one: one.name)
@torch.no_grad()
def test_copies_are_apart(one: contender.Contender) -> None:
    """Two copies on different inputs do not disturb each other, in whatever order they are called."""
    w = weight()
    copies = [made(one, w), made(one, w)]
    inputs = [torch.randn(2, w.size(1)) for _ in copies]
    calls = [copy.bind(x) for copy, x in zip(copies, inputs, strict=True)]
    first = [contender.as_tensor(call()).clone() for call in calls]
    again = [contender.as_tensor(call()).clone() for call in reversed(calls)]
    assert torch.equal(first[0], again[1]) and torch.equal(first[1], again[0])
    assert not torch.equal(first[0], first[1])


def test_contenders_that_cannot_are_rows_with_a_reason() -> None:
    def fail(w: torch.Tensor) -> Any:
        raise ImportError("the library is not installed")

    contenders = [PEERS[0], contender.Contender("absent", 4, fail, "absent")]
    results = layers.measure([layers.Layer(32, 64, (1,), cached=True)], contenders, SHORT)
    assert [row["contender"] for row in results["rows"]] == ["torch fp32"]
    assert results["missing"] == [{"rows": 32, "columns": 64, "contender": "absent", "reason": "the library is not installed"}]


def test_cold_weights_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 16 rows of x every copy is used; from 128 on, one."""
    monkeypatch.setattr(layers, "COLD_BYTES", 3 * 32 * 64 * 4)
    used: list[tuple[int, int]] = []

    def load(w: torch.Tensor) -> Any:
        numbers = iter(range(9))

        def copy() -> contender.Copy:
            number = next(numbers)

            def bind(x: torch.Tensor) -> timing.Call:
                def call() -> torch.Tensor:
                    used.append((x.size(0), number))
                    return x @ w.t()

                return call

            return contender.Copy(w.nbytes, bind)

        return copy

    budget = timing.Budget(seconds=0.0, rounds=4, turn=0.0, rest=False)
    layers.measure([layers.Layer(32, 64, (4, 128))], [contender.Contender("spy", 32, load, "spy")], budget)
    assert {number for rows, number in used if rows == 4} == {0, 1, 2}
    assert {number for rows, number in used if rows == 128} == {0}


def test_ratios_are_to_the_fastest_peers() -> None:
    def row(name: str, bits: int, median: float, own: bool = False) -> dict[str, Any]:
        shape = {"rows": 8, "columns": 8, "inputs": 1, "cold": True, "bytes": 1000}
        return shape | {"contender": name, "bits": bits, "ours": own, "seconds": {"median": median}}

    rows = [row("kbit 4", 4, 6e-6, own=True), row("a", 4, 3e-6), row("b", 4, 4e-6), row("c", 8, 2e-6), row("kbit 3", 3, 1e-6, True)]
    four, three = layers.compare(rows, bandwidth=1e9)
    assert (four["of_reading"], four["of_best"], four["best"], four["of_same_bits"]) == pytest.approx((6, 3, "c", 2), abs=1e-9)
    assert three["of_best"] == pytest.approx(0.5) and three["of_same_bits"] is None
    assert layers.compare(rows, bandwidth=None)[0]["of_reading"] is None


def test_turns_are_interleaved() -> None:
    calls: list[str] = []
    budget = timing.Budget(seconds=0.0, rounds=2, turn=0.0, rest=False)
    seconds = timing.interleave({name: [lambda name=name: calls.append(name)] for name in "ab"}, budget)
    assert calls == list("aabb" * 2)  # in each turn a call that is not timed, then one that is
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_rest_waits_for_busy_threads() -> None:
    busy = threading.Event()
    busy.set()

    def spin() -> None:
        end = time.perf_counter() + 10
        while busy.is_set() and time.perf_counter() < end:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    stopper = threading.Timer(0.1, busy.clear)
    stopper.start()
    timing.rest()
    assert not busy.is_set()
    thread.join()


def test_summary_ignores_the_outer_tenths() -> None:
    found = timing.summary([float(number) for number in [*range(1, 20), 1000]])
    assert found == {"median": 10.5, "p10": 3.0, "p90": 18.0, "calls": 20}


def test_ceilings() -> None:
    found = ceilings.measure(SHORT, size=1 << 20, width=64)
    assert set(found["peaks"]) == {"int8", "bf16", "fp32"} and min(found["peaks"].values()) > 0
    assert set(found["read_bandwidth"]) == {"4k", "huge"} or "read_bandwidth" in found["missing"]


def test_reading_reads_every_word() -> None:
    read = ceilings._reader()
    data = torch.zeros(1 << 16, dtype=torch.int64)
    for place in (0, 4097, len(data) // 2 + 3, len(data) - 1):
        data[place] = 5
        assert read(data) == 5
        data[place] = 0


def test_events_belong_to_parts() -> None:
    named = {
        "kbit::fused_linear_cpu": "our kernels",
        "graph_1_cpp_fused__scaled_dot_product_flash_attention_for_cpu_cos_mul_0": "other Inductor kernels",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::argmax": "sampling",
        "aten::cat": "other operators",
        "## Call CompiledFxGraph f00 ##": None,
    }
    assert {event: breakdown.part_of(event) for event in named} == named


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The results of a quick run of all parts, and the folder of its files."""
    folder = tmp_path_factory.mktemp("quick")
    run.main(["--quick", "--json", str(folder / "cpu.json"), "--pictures", str(folder)])
    return json.loads((folder / "cpu.json").read_text(encoding="utf-8")), folder


@compiles
def test_quick_run_has_every_part(quick: tuple[dict[str, Any], Path]) -> None:
    results, folder = quick
    assert {"quick", "machine", *run.PARTS} == set(results)
    for part in ("layers", "smollm2", "minilm", "breakdown"):
        assert not [gone for gone in results[part]["missing"] if "kbit" in gone["contender"]]
        assert any("kbit" in row["contender"] for row in results[part]["rows"])
    for picture in tables.PICTURES:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@compiles
def test_rows_have_their_figures(quick: tuple[dict[str, Any], Path]) -> None:
    results, _ = quick
    for row in results["layers"]["rows"]:
        assert row["error"] < ERRORS[row["bits"]] and row["bytes"] > 0
        assert 0 < row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
    for row in results["smollm2"]["rows"]:
        assert min(row["weight_bytes"], row["cache_bytes"], row["resident_bytes"], row["window_seconds"]) > 0
        assert row["resident_bytes"] <= row["peak_bytes"]
    floats, packed = results["smollm2"]["rows"]
    assert packed["weight_bytes"] < floats["weight_bytes"] / 4
    for row in results["breakdown"]["rows"]:
        assert row["parts"]["our kernels"] > 0
        assert set(row["parts"]) == {part for part, _ in breakdown.PARTS} | {breakdown.REST}


@compiles
def test_tables_show_every_row(quick: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    results, _ = quick
    grids = tables.grids(results)
    assert all(len(row) == len(grid.head) for grid in grids for row in grid.rows)
    console = Console(width=200, record=True)
    for grid in grids:
        console.print(tables.drawn(grid))
    printed = console.export_text()
    document = tmp_path / "benchmarks.md"
    document.write_text(f"before\n<!-- {tables.MARK}: begin -->\nold\n<!-- {tables.MARK}: end -->\nafter\n")
    for _ in range(2):
        tables.write(tables.report(results, document.parent), document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    for row in results["layers"]["rows"] + results["smollm2"]["rows"]:
        assert row["contender"] in printed and f"| {row['contender']} |" in text
    document.write_text("no markers")
    with pytest.raises(SystemExit, match="no lines"):
        tables.write(tables.report(results, document.parent), document)
    assert f"<!-- {tables.MARK}: begin -->" in (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@compiles
def test_only_measures_what_is_asked(quick: tuple[dict[str, Any], Path]) -> None:
    results, folder = quick
    run.main(["--quick", "--only", "ceilings", "--json", str(folder / "cpu.json"), "--pictures", str(folder)])
    again = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))
    assert again["layers"] == results["layers"] and again["ceilings"] != results["ceilings"]
    with pytest.raises(SystemExit):
        run.main(["--only", "nothing"])


@compiles
def test_pictures_need_no_ceilings(quick: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    results = {key: value for key, value in quick[0].items() if key != "ceilings"}
    assert plots.layers(results, tmp_path / "layers.png").exists()
    assert tables.grids(results)


@compiles
def test_processes_say_why_they_fail(tmp_path: Path) -> None:
    models.prepare_tiny(tmp_path)
    results = models.measure(tmp_path, ["eager-float12", "kbit-9"], repeats=1)
    assert results["rows"] == []
    reasons = {gone["contender"]: gone["reason"] for gone in results["missing"]}
    assert "float12" in reasons["eager-float12"] and "bits" in reasons["kbit-9"]


def test_greedy_generates_what_the_model_prefers(tmp_path: Path) -> None:
    from cpu import generators

    models.prepare_tiny(tmp_path)
    loaded = generators.load(tmp_path, "eager-float32", 16)
    import smollm2

    model, _ = smollm2.load(tmp_path)
    expected = [3, 1, 4]
    for _ in range(5):
        with torch.no_grad():
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert loaded.generate([3, 1, 4], 5) == expected[3:]
    assert loaded.cache_bytes == 2 * 2 * 32 * 16 * 4  # keys and values, layers, width, tokens, bytes


@compiles
@torch.no_grad()
def test_encoders_agree() -> None:
    """All but the quantized rows give the float model's vectors, padding or not."""
    encoder = minilm.tiny()
    ids = torch.randint(1000, 2000, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    expected = encoder(ids, mask)
    torch.testing.assert_close(encoder(ids[1:, :7], mask[1:, :7]), expected[1:])
    for name, encode in minilm.torch_rows(encoder).items():
        torch.testing.assert_close(encode(ids, mask).float(), expected, atol=0.02 if "bfloat16" in name else 1e-5, rtol=0)


@torch.no_grad()
def test_every_contender_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many contenders of one class, each with several shapes, together more than Dynamo keeps for one function."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    counters = [CompileCounter() for _ in range(3)]
    modules = [torch.compile(minilm._copy(minilm.tiny()), backend=counter, dynamic=False) for counter in counters]
    for length in (4, 5, 6):
        ids = torch.ones(1, length, dtype=torch.int64)
        for module in modules:
            module(ids, ids)
    assert [counter.frame_count for counter in counters] == [3] * 3


@torch.no_grad()
def test_quantized_encoders_are_quantized() -> None:
    encoder = minilm.tiny()
    ids = torch.randint(1000, 2000, (2, 12))
    mask = torch.ones_like(ids)
    expected = encoder(ids, mask)
    for encode in minilm.kbit_rows(encoder).values():
        assert 1e-4 < (encode(ids, mask) - expected).norm(dim=-1).max() < 0.3


@torch.no_grad()
def test_onnx_runtime_gives_the_models_vectors() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = minilm.tiny()
    ids = torch.randint(1000, 2000, (3, 9))
    mask = torch.ones_like(ids)
    for name, encode in minilm.onnx_rows(encoder).items():
        torch.testing.assert_close(encode(ids, mask), encoder(ids, mask), atol=0.05 if "int8" in name else 1e-5, rtol=0)


def test_pairs_are_read(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('A cat.,"A cat, asleep.",3.5\n', encoding="utf-8")
    assert minilm.read_pairs(tmp_path / "pairs.csv") == [("A cat.", "A cat, asleep.", 3.5)]
