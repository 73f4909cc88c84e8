"""The GPU benchmark as far as a machine without a GPU can show it: it ends, in time, with a whole file. Nothing is timed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from gpu import configurations, contenders, layers, llama, run, suite, tables, targets  # noqa: E402
from gpu.clock import RehearsalClock  # noqa: E402
from gpu.session import OUT_OF_TIME, Session, ending  # noqa: E402

from kbit_inductor.kernels.triton.config import Config  # noqa: E402
from kbit_inductor.kernels.words import WordLayout  # noqa: E402
from kbit_inductor.lowering.problem import Problem  # noqa: E402
from kbit_inductor.lowering.tuner.key import Place, shape_key  # noqa: E402
from kbit_inductor.lowering.tuner.table import Table  # noqa: E402

TINY = Problem("linear", "cuda", torch.float16, 64, 256, 4, 128)

pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The results of all parts but the tests, and the picture. Models run in eager: compiling them is not what is tested."""
    folder = tmp_path_factory.mktemp("rehearsal")
    file, picture = folder / "gpu.json", folder / "layers.png"
    with torch.compiler.set_stance("force_eager"):
        parts = ",".join(run.SHARES.keys() - {"tests"})
        code = run.main(["--rehearse", "--only", parts, "--json", str(file), "--picture", str(picture)])
    assert code == 0
    return json.loads(file.read_text(encoding="utf-8")), picture


def test_a_rehearsal_has_every_part_and_says_what_it_is(rehearsed: tuple[dict[str, Any], Path]) -> None:
    results, picture = rehearsed
    assert results["rehearsal"] is True and "targets" not in results and "rehearsal" in results["machine"]["device"]
    assert {"cuBLAS float16", "kbit 4", "kbit 2"} == {row["contender"] for row in results["layers"]["rows"]}
    assert all(row["seconds"] == 1e-6 and row["bytes"] > 0 and row["chain"] > 1 for row in results["layers"]["rows"])
    assert len(results["epilogue"]["rows"]) == 4 and not results["epilogue"]["missing"]
    models = {row["contender"]: row for row in results["models"]["rows"]}
    assert set(models) == {"kbit 4", "torch.compile"}
    assert {"decode_1_seconds", "decode_2_seconds", "prefill_16_seconds", "read_bytes"} <= set(models["kbit 4"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_configurations_are_a_table_that_goes_on(rehearsed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    results, picture = rehearsed
    (row,) = results["configurations"]["rows"]
    assert row["complete"] and row["timed"] == row["configurations"] > 8 and row["behind"] == 0
    file = picture.with_name(configurations.FILE)
    (times,) = Table.read(file).shapes.values()
    assert len(times) == row["timed"]
    half = Table(Place("none: a rehearsal", "none"), {shape_key(TINY, 1): dict(list(times.items())[:5])})
    half.write(tmp_path / configurations.FILE)
    again = session(tmp_path, 60, "configurations")
    configurations.measure(again)
    assert Table.read(tmp_path / configurations.FILE).shapes == Table.read(file).shapes


def test_what_is_compiled_ahead_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the arguments alone: no driver is there to compile for."""
    linear = pytest.importorskip("kbit_inductor.kernels.triton.linear", reason="Triton is not installed")
    seen: list[dict[str, Any]] = []
    kernel = SimpleNamespace(warmup=lambda grid, **arguments: seen.append(arguments))
    monkeypatch.setattr(linear, "linear_kernel", kernel)
    config = Config(8, 32, 4, num_warps=2)
    configurations.compile_one(TINY, 1, config)
    launched = type("Launcher", (), {"__getitem__": lambda _, grid: lambda **arguments: seen.append(arguments)})()
    monkeypatch.setattr(linear, "linear_kernel", launched)
    words = torch.zeros(64, WordLayout.of(4, 256, 128).row_words, dtype=torch.int16)
    scale = torch.zeros(2, 64).half()
    linear.linear(torch.zeros(1, 256).half(), words, scale, scale, torch.ones(1), None, 4, 128, config=config)
    ahead, now = ({name: _kind(value) for name, value in each.items() if name != "PTX"} for each in seen)
    assert ahead == now


def _kind(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value


def test_peers_are_rows_with_a_reason(rehearsed: tuple[dict[str, Any], Path]) -> None:
    results, _ = rehearsed
    names = {peer.name for peer in contenders.peers()}
    assert {gone["contender"] for gone in results["peers"]["missing"]} == names and not results["peers"]["rows"]
    assert all("its kernels need a GPU" in gone["reason"] for gone in results["peers"]["missing"])


def test_a_rehearsal_stays_out_of_the_results() -> None:
    with pytest.raises(SystemExit):
        run.main(["--rehearse", "--json", str(run.RESULTS / "gpu.json")])
    assert not json.loads((run.RESULTS / "gpu.json").read_text())["rehearsal"] if (run.RESULTS / "gpu.json").exists() else True


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([]) == 1 and "--rehearse" in capsys.readouterr().out


def session(path: Path, seconds: float, part: str = "layers") -> Session:
    made = Session(torch.device("cpu"), RehearsalClock(), path / "gpu.json", time.monotonic() + seconds)
    made.begin(part, 1.0)
    return made


def test_what_there_is_no_time_for_is_missing(tmp_path: Path) -> None:
    late = session(tmp_path, 0)
    with late.row({"m": 1}) as there_is_time:
        assert not there_is_time
    assert json.loads(late.file.read_text())["layers"]["missing"] == [{"m": 1, "reason": OUT_OF_TIME}]


def test_the_file_is_whole_after_every_row(tmp_path: Path) -> None:
    made = session(tmp_path, 60)
    for number in range(3):
        with made.row({"m": number}):
            if number == 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
            made.add({"m": number})
        written = json.loads(made.file.read_text())["layers"]
        assert len(written["rows"]) + len(written["missing"]) == number + 1
    assert written["missing"] == [{"m": 1, "reason": "OutOfMemoryError: CUDA out of memory."}]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_row_that_does_not_end_is_ended() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="--minutes"), ending(0.05):
        while time.monotonic() < began + 20:
            time.sleep(0.01)
    assert time.monotonic() < began + 10


def test_what_matters_most_comes_first() -> None:
    ours = [contenders.floats(), contenders.ours(4)]
    order = list(layers.points(False, layers.SHAPES, ours))
    assert len(order) == len(set(order)) == 13 * 4 * 2
    assert {m for m, _, _ in order} == {2**i for i in range(13)}
    assert [m for m, _, _ in order[:8]] == [1] * 8 and order[0][1] == (8192, 8192)


def test_nothing_is_timed_when_a_test_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "run", lambda session: False)
    file = tmp_path / "gpu.json"
    assert run.main(["--rehearse", "--json", str(file), "--picture", str(tmp_path / "x.png")]) == 1
    assert set(json.loads(file.read_text())) == {"rehearsal", "tuned", "machine", "tests", "seconds"}


def test_reports_of_tests_are_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="tests.test_gpu" name="a"/>'
        '<testcase classname="tests.test_gpu" name="b"><failure/></testcase></testsuite></testsuites>'
    )
    assert suite._counts(report) == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
    assert suite._failed(report) == ["tests.test_gpu::b"]


def test_tests_that_are_all_skipped_show_nothing() -> None:
    skipped = {"tests": 35, "failures": 0, "errors": 0, "skipped": 35}
    assert suite.acceptable(skipped, rehearsal=True) and not suite.acceptable(skipped, rehearsal=False)
    assert suite.acceptable(skipped | {"skipped": 1}, rehearsal=False)
    assert not suite.acceptable(skipped | {"skipped": 1, "errors": 1}, rehearsal=False)


def row(contender: str, m: int, seconds: float, share: float = 0.7, bits: int = 4) -> dict[str, Any]:
    return {"n": 8192, "k": 8192, "m": m, "contender": contender, "bits": bits, "seconds": seconds, "roofline_share": share}


def test_targets_are_judged_by_the_worst_figure() -> None:
    rows = [row("kbit 4", 1, 1.0), row("kbit 2", 1, 1.0, 0.65, 2), row("gemlite 4", 1, 1.5)]
    rows += [row("kbit 4", 256, 2.0), row("cuBLAS float16", 256, 1.8, bits=16)]
    results = {"layers": {"rows": rows, "missing": []}, "epilogue": {"rows": [{"cost": 0.02}, {"cost": 0.05}]}}
    found = {(target["target"], target["least"]): (target["found"], target["met"]) for target in targets.judged(results)}
    share = f"{targets.SIDE}², one row, 2, 3, 4 and 8 bits: share of the roofline"
    assert found[share, 0.6] == (0.65, True) and found[share, 0.8] == (0.65, False)
    assert found["8192², 1 rows: times faster than the fastest peer of as many bits", 1.0] == (1.5, True)
    assert found["all layers, from 256 rows up: times faster than cuBLAS", 1.0] == (0.9, False)
    assert found["fused epilogue: its cost, negative", -0.03] == (-0.05, False)
    assert found["Llama 8B at 4 bits, batch 1: share of the bytes' limit", 0.8] == (None, None)
    whole = {**results, "rehearsal": False, "machine": {"device": "a GPU"}, "epilogue": {"rows": []}}
    assert list(tables.tables({**whole, "targets": targets.judged(results)}))


def tiny() -> Any:
    return llama.random_model("tiny", torch.float32, torch.device("cpu"))


def test_steps_and_prompts_give_the_logits_of_the_model() -> None:
    model = tiny()
    expected = model(input_ids=torch.arange(16)[None], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(llama.prompt(model, 16)(), expected)
    expected = model(input_ids=torch.ones(3, 1, dtype=torch.int64), use_cache=False).logits
    step = llama.Decoding(model, 3, 0)
    for _ in range(3):  # it can be replayed: each writes where the last one wrote
        torch.testing.assert_close(step(), expected)


class OnTheDeviceAlone(TorchDispatchMode):
    """Refuses what cannot be captured in a CUDA graph: a tensor that comes from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta:
            hosts = [each for each in args if isinstance(each, torch.Tensor) and each.device.type == "cpu" and each.dim()]
            assert not hosts, f"{func} brings a tensor from the host"
        return result


def test_a_step_can_be_captured() -> None:
    """On meta tensors, of which no value can be read back: neither that, nor a copy from the host, is in a step or a prompt."""
    model = tiny().to("meta")
    step, prompt = llama.Decoding(model, 2, 8), llama.prompt(model, 16)
    with OnTheDeviceAlone():
        assert step().is_meta and prompt().is_meta
    with OnTheDeviceAlone(), pytest.raises(AssertionError, match="from the host"):
        torch.ones(2).to("meta")
