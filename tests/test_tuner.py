"""The autotuner on simulated GPUs: tables in files, limits of time, several devices, and the command."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from simulated_gpu import simulate
from typer.testing import CliRunner

import kbit_inductor as kbit
from kbit_inductor import kernels, tuning
from kbit_inductor.cli import app as commands
from kbit_inductor.cli import tune as command_tune
from kbit_inductor.kernels.triton.config import FLOAT_ROWS, Config
from kbit_inductor.lowering import float_rows, gpu
from kbit_inductor.lowering.cost import measure, triton_ways
from kbit_inductor.lowering.cost.device import find
from kbit_inductor.lowering.cost.short_list import LENGTH, candidates, short_list
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import KERNELS, Choice
from kbit_inductor.lowering.tuner import gpu_timer, key, lookup
from kbit_inductor.lowering.tuner.key import Place, bucket, shape_key
from kbit_inductor.lowering.tuner.store import SHIPPED, Store, user_store
from kbit_inductor.lowering.tuner.table import Table, TableError
from kbit_inductor.lowering.tuner.tune import DoesNotFit, tune
from kbit_inductor.packing import pack

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from gpu import configurations
from gpu.targets import NOISE

RESULTS = Path(configurations.__file__).parents[1] / "results"
HERE = Place("NVIDIA H200", "0123")
ONE, TWO, THREE = (Config(8, 32, 4, split_k=split) for split in (1, 2, 3))
PROBLEM = Problem("linear", "cuda", torch.float16, 1024, 2048, 4, 128)
GPUS = ("H200", "L4")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tuning", tmp_path / "shipped")


def test_what_is_added_is_found_again_by_another_process(store: Store) -> None:
    store.add(Table(HERE, {"a": {ONE: 2e-5, TWO: float("inf")}}))
    store.add(Table(HERE, {"a": {THREE: 1e-5}, "b": {TWO: 1e-6}}))
    again = Store(store.folder, store.shipped).table(HERE)
    assert again.shapes == {"a": {ONE: 2e-5, TWO: float("inf"), THREE: 1e-5}, "b": {TWO: 1e-6}}
    assert (again.best("a"), again.best("b"), again.best("c")) == (THREE, TWO, None)
    for other in (Place("NVIDIA H200", "4567"), Place("NVIDIA L4", "0123"), Place("NVIDIA-H200", "0123")):
        assert store.table(other).shapes == {}


def test_times_of_the_package_are_there_and_those_of_the_user_win(store: Store) -> None:
    store.shipped.mkdir()
    Table(HERE, {"a": {ONE: 2.0, TWO: 1.0}, "b": {ONE: 1.0}}).write(store.shipped / HERE.file_name)
    assert store.table(HERE).best("a") == TWO
    store.add(Table(HERE, {"a": {TWO: 3.0}}))
    assert (store.table(HERE).best("a"), store.table(HERE).best("b")) == (ONE, ONE)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 2}', b'{"format": 1, "device": "d", "source": "s", "shapes": {"a": [{}]}}'],
)
def test_a_damaged_file_is_set_aside_and_told_once(store: Store, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store.folder.mkdir()
    path = store.folder / HERE.file_name
    path.write_bytes(content)
    for _ in range(2):
        assert store.table(HERE).shapes == {}
    assert len(caplog.records) == 1 and path.name in caplog.text
    (aside,) = store.folder.glob("*.damaged-*")
    assert aside.read_bytes() == content
    store.add(Table(HERE, {"a": {ONE: 1.0}}))
    assert store.table(HERE).best("a") == ONE


@given(
    text=st.text()
    | st.recursive(st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)).map(json.dumps)
)
def test_any_text_is_a_table_or_an_error(text: str) -> None:
    with pytest.raises(TableError):
        Table.loads(text)


def _add_many(folder: Path, process: int) -> None:
    store = Store(folder, folder)
    for i in range(20):
        store.add(Table(HERE, {f"{process}-{i}": {ONE: 1.0}}))


def test_two_processes_write_at_once(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_many, args=(store.folder, number)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert set(store.table(HERE).shapes) == {f"{process}-{i}" for process in range(2) for i in range(20)}
    assert [path.suffix for path in store.folder.iterdir() if path.suffix != ".lock"] == [".json"]


def test_an_interrupted_write_leaves_the_old_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(Table(HERE, {"a": {ONE: 1.0}}))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.add(Table(HERE, {"a": {ONE: 5.0}}))
    assert store.table(HERE).shapes == {"a": {ONE: 1.0}}
    assert len([path for path in store.folder.iterdir() if path.suffix != ".lock"]) == 1


def test_where_nothing_can_be_written_times_stay_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "tuning", tmp_path)
    for shape in ("a", "b"):
        store.add(Table(HERE, {shape: {ONE: 1.0}}))
    assert (store.table(HERE).best("a"), store.table(HERE).best("b")) == (ONE, ONE)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "KBIT_CACHE_DIR" in caplog.text


class Stopwatch:
    """A clock that timing a configuration advances."""

    def __init__(self, each: float) -> None:
        self.now, self.each, self.timed = 100.0, each, list[Config]()

    def __call__(self) -> float:
        return self.now

    def timer(self, config: Config) -> float:
        self.now += self.each
        self.timed.append(config)
        return 1.0 / config.split_k


@given(each=st.floats(0.01, 5), limit=st.floats(0.1, 5), count=st.integers(1, 8))
def test_tuning_ends_in_time(each: float, limit: float, count: int) -> None:
    clock = Stopwatch(each)
    configs = [Config(8, 32, 4, split_k=split) for split in range(1, count + 1)]
    tuned = tune(configs, clock.timer, limit=limit, clock=clock)
    assert clock.now - 100 <= max(limit, each) * (1 + 1e-9)
    assert list(tuned.times) == clock.timed == configs[: len(clock.timed)] != []
    assert tuned.complete == (len(clock.timed) == count)
    rest = tune(configs, clock.timer, tuned.times, limit=float("inf"), clock=clock)
    assert rest.complete and clock.timed == configs  # what is known is not timed again


def test_what_does_not_fit_is_dropped_and_an_interrupt_keeps_the_rest() -> None:
    def timer(config: Config) -> float:
        if config == ONE:
            raise DoesNotFit("out of shared memory")
        if config == THREE:
            raise KeyboardInterrupt
        return 1.0

    tuned = tune([ONE, TWO, THREE], timer)
    assert tuned.times == {ONE: float("inf"), TWO: 1.0}
    assert tuned.dropped == ((ONE, "out of shared memory"),)
    assert tuned.interrupted and not tuned.complete
    assert Table(HERE, {"a": {ONE: float("inf")}}).best("a") is None


@pytest.mark.parametrize("tried", range(4))
def test_an_interrupt_at_any_time_leaves_a_whole_file(tried: int, store: Store) -> None:
    """What was timed before it is kept, and the next run goes on there."""

    def timer(config: Config) -> float:
        if config.split_k > tried:
            raise KeyboardInterrupt
        return 1.0

    configs = [ONE, TWO, THREE]
    tuned = tune(configs, timer)
    store.add(Table(HERE, {"a": tuned.times}))
    found = Store(store.folder, store.shipped).table(HERE).shapes["a"]
    assert list(found) == configs[:tried] and tuned.interrupted == (tried < 3)
    assert list(tune(configs, lambda config: 2.0, found).times.values()) == [1.0] * tried + [2.0] * (3 - tried)


def test_every_launch_that_is_timed_reads_a_weight_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that twice the cache does not hold them."""
    linear = pytest.importorskip("kbit_inductor.kernels.triton.linear", reason="Triton is not installed")
    cache, seen = 1 << 20, list[torch.Tensor]()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache))
    monkeypatch.setattr(linear, "linear", lambda x, words, *rest, **options: seen.append(words) or options["config"])
    launches = gpu_timer._launches(PROBLEM, 3, torch.device("cpu"))
    assert [launch(TWO) for launch in launches] == [TWO] * len(launches)
    assert len({words.data_ptr() for words in seen}) == len(seen) and sum(words.nbytes for words in seen) >= 2 * cache
    assert seen[0].nbytes == PROBLEM.rows * PROBLEM.columns * PROBLEM.bits // 8


def test_a_graph_of_the_whole_chain_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whose graphs count what they recorded: the least of the replays, over as many calls."""
    state: dict[str, Any] = {"recording": False, "recorded": 0, "replays": 0, "compiled": 0}
    milliseconds = iter([9.0, 4.0, 8.0, 7.0, 6.0])

    @contextlib.contextmanager
    def graph(_: object) -> Iterator[None]:
        state["recording"] = True
        yield
        state["recording"] = False

    def call() -> None:
        state["recorded" if state["recording"] else "compiled"] += 1

    stream = SimpleNamespace(wait_stream=lambda other: None)
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: next(milliseconds))
    fakes = {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda _: contextlib.nullcontext(), "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: state.update(replays=state["replays"] + 1)),
        "Event": lambda enable_timing: event,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert gpu_timer._graph_seconds([call] * 5) == 4e-3 / 20
    assert state == {"recording": False, "recorded": 20, "replays": gpu_timer.REPLAYS, "compiled": 1}


def test_what_does_not_fit_or_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="Triton is not installed")
    raised = iter([errors.OutOfResources(300_000, 232_448, "shared memory"), errors.PTXASError("ptxas"), MemoryError()])

    def seconds(calls: object) -> float:
        raise next(raised)

    monkeypatch.setattr(gpu_timer, "_launches", lambda *_: [])
    monkeypatch.setattr(gpu_timer, "_graph_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    timer = gpu_timer.gpu_timer(PROBLEM, 1, FIRST)
    for why in ("shared memory", "ptxas"):
        with pytest.raises(DoesNotFit, match=why):
            timer(ONE)
    with pytest.raises(MemoryError):
        timer(ONE)


def test_times_are_of_the_kernels_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of all of them and of Triton, but for the rule for what is launched where nothing was measured."""
    folder = shutil.copytree(
        Path(kernels.__file__).parent, tmp_path / "kernels", ignore=shutil.ignore_patterns("cpu", "__pycache__")
    )
    monkeypatch.setattr(kernels, "__file__", str(folder / "__init__.py"))

    def hashed() -> str:
        return key.source_hash.__wrapped__()

    first = hashed()
    with (folder / "triton" / key.RULE).open("a") as file:
        file.write("# other\n")
    assert hashed() == first
    for changed in (folder / "words.py", folder / "triton" / "linear.py", folder / "triton" / "unpack.py"):
        before = hashed()
        with changed.open("a") as file:
            file.write("# other\n")
        assert hashed() != before
    monkeypatch.setattr(key, "_triton_version", lambda: "0.0")
    assert hashed() != before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[str, Config]]]:
    """A machine with two simulated GPUs of different kinds; gives what is timed on which."""
    timed: list[tuple[str, Config]] = []

    def record_of(device: torch.device) -> object:
        return find(GPUS[device.index])

    def timer_of(problem: Problem, m: int, device: torch.device) -> Callable[[Config], float]:
        def timer(config: Config) -> float:
            timed.append((GPUS[device.index], config))
            return simulate(problem, m, config, record_of(device))

        return timer

    monkeypatch.setenv("KBIT_CACHE_DIR", str(tmp_path))
    for module in (tuning, command_tune):
        monkeypatch.setattr(module, "gpu_of", torch.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(lookup, "place_of", lambda device: Place(GPUS[device.index], key.source_hash()))
    monkeypatch.setattr(measure, "record_of", record_of)
    monkeypatch.setattr(gpu_timer, "gpu_timer", timer_of)
    monkeypatch.setattr(tuning, "choose", lambda problem: Choice(TRITON, ()))
    lookup.forget()
    yield timed
    lookup.forget()


(TRITON,) = (kernel for kernel in KERNELS if kernel.name == "triton")
FIRST, SECOND = (torch.device("cuda", index) for index in range(2))


def test_each_gpu_of_a_process_has_times_of_its_own(machine: list[tuple[str, Config]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lookup.config_for(PROBLEM, 1, FIRST) is None and machine == []
    lookup.forget()
    monkeypatch.setenv("KBIT_TUNE", "1")
    chosen = [lookup.config_for(PROBLEM, 3, device) for device in (FIRST, SECOND)]
    for name, config in zip(GPUS, chosen, strict=True):
        record = find(name)
        assert record is not None
        listed = [each.config for each in short_list(PROBLEM, 4, record)]
        assert [each for gpu, each in machine if gpu == name] == listed and len(listed) == LENGTH
        assert config == min(listed, key=lambda each: simulate(PROBLEM, 4, each, record))
    assert len(machine) == 2 * LENGTH
    assert lookup.config_for(PROBLEM, 4, FIRST) == chosen[0] and len(machine) == 2 * LENGTH  # of the same bucket
    lookup.forget()
    monkeypatch.delenv("KBIT_TUNE")
    assert lookup.config_for(PROBLEM, 3, SECOND) == chosen[1] and len(machine) == 2 * LENGTH  # from the file


def test_nothing_is_measured_while_a_graph_is_captured(machine: list[tuple[str, Config]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KBIT_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert lookup.config_for(PROBLEM, 1, FIRST) is None and machine == []


def test_a_launch_takes_the_tuned_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("kbit_inductor.kernels.triton.linear", reason="Triton is not installed")
    launched, asked = [], []

    def config_for(problem: Problem, m: int, device: torch.device) -> Config:
        asked.append((problem, m))
        return TWO

    monkeypatch.setattr(gpu, "config_for", config_for)
    monkeypatch.setattr(module, "fused_linear", lambda *operands: launched.append(operands[-1]))
    config = kbit.LayerConfig(bits=3, group_size=32, symmetric=True)
    operands = pack(torch.randn(24, 64), config, layout="words").operands
    words, scale, one = operands
    gpu._linear(torch.randn(2, 5, 64).half(), words, scale, None, one, None, 3, 32)
    assert launched == [TWO]
    assert asked == [(Problem("linear", "cuda", torch.float16, 24, 64, 3, 32, symmetric=True), 10)]


@pytest.mark.parametrize(("gpu_name", "first"), [("NVIDIA H200", None), ("NVIDIA L4", None), ("NVIDIA T1000", FLOAT_ROWS)])
def test_a_launch_unpacks_where_the_cost_model_says(gpu_name: str, first: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that no record is shipped for, from the constant on; nothing is measured at a launch."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu_name)
    monkeypatch.setattr(measure, "record_of", lambda device: pytest.fail("measured at a launch"))
    float_rows._float_rows.cache_clear()
    record = find(gpu_name)
    first = first or triton_ways.float_rows(PROBLEM, record)
    found = [float_rows.multiplies_in_float(PROBLEM, m, FIRST) for m in (1, first - 1, first, 10**6)]
    assert found == [False, False, True, True]
    rounded = Problem("linear", "cuda", torch.float16, 1024, 2048, 4, 128, activation_bits=8)
    assert record is None or not float_rows.multiplies_in_float(rounded, 10**6, FIRST)
    assert float_rows.multiplies_in_float(PROBLEM, FLOAT_ROWS, torch.device("cpu"))  # an interpreter
    float_rows._float_rows.cache_clear()


@given(m=st.integers(0, 10**6))
def test_a_bucket_is_the_next_power_of_two(m: int) -> None:
    assert max(m, 1) <= bucket(m) < 2 * max(m, 1) and bucket(bucket(m)) == bucket(m)


def test_shapes_have_names_of_their_own() -> None:
    others = [{"rows": 8}, {"columns": 64}, {"bits": 3}, {"group_size": 32}, {"uniform": False}, {"symmetric": True},
              {"dtype": torch.bfloat16}, {"activation_bits": 8}]  # fmt: skip
    problems = [PROBLEM, *(Problem(**{**vars(PROBLEM), **other}) for other in others)]
    keys = {shape_key(problem, m): (problem, bucket(m)) for problem in problems for m in (1, 2, 3)}
    assert len(keys) == 3 * len(problems)
    assert {shape: key.problem_of(shape) for shape in keys} == keys


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(300, 64), torch.nn.Linear(64, 320)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def command(*arguments: object) -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(commands.app, ["tune", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_the_command_measures_a_model_and_its_times_travel(
    machine: list[tuple[str, Config]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command_tune, "open_model", lambda _: Tiny().eval())
    out = tmp_path / "out"
    code, found = command("model", "-o", "bits=3", "--rows", 1, "--rows", 16, "--device", "cuda:1", "--export", out)
    assert code == 0 and found["exported_files"] == 1
    assert [done["shape"] for done in found["shapes"]] == [f"bfloat16-3bit-g64-n320-k64-m{m}" for m in (1, 16)]
    assert all(done["complete"] and done["seconds"] > 0 for done in found["shapes"])
    monkeypatch.setenv("KBIT_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert command("--import", out) == (0, {"imported_shapes": 2, "shapes": []})
    problem = Problem("linear", "cuda", torch.bfloat16, 320, 64, 3, 64)
    assert lookup.config_for(problem, 16, SECOND) is not None and lookup.config_for(problem, 16, FIRST) is None


def test_an_interrupted_command_keeps_what_it_has(
    machine: list[tuple[str, Config]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command_tune, "open_model", lambda _: Tiny().eval())

    def timer_of(*_: object) -> Callable[[Config], float]:
        calls = iter([1.0, 2.0])

        def timer(config: Config) -> float:
            for seconds in calls:
                return seconds
            raise KeyboardInterrupt

        return timer

    monkeypatch.setattr(gpu_timer, "gpu_timer", timer_of)
    code, found = command("model", "--device", "cuda:0")
    assert code == 130 and [(done["tried"], done["interrupted"]) for done in found["shapes"]] == [(2, True)]
    (table,) = user_store().tables()
    assert [list(times.values()) for times in table.shapes.values()] == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [([], "nothing to do"), (["model"], "none of the 0 that torch finds"), (["model", "--device", "cpu"], "'cpu' is none"),
     (["--import", "nowhere.json"], "cannot be imported"), (["model", "--dtype", "int8"], "'dtype'")],
)  # fmt: skip
def test_mistakes_are_told(arguments: list[str], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, found = command(*arguments)
    assert code == 1 and kind in str(found["error"])


def test_the_recorded_best_is_in_the_short_list() -> None:
    """On times of real GPUs, by ``make gpu`` and by ``kbit tune --exhaustive``: up to what two measurements differ by."""
    tables = [Table.read(path) for path in (*SHIPPED.glob("*.json"), *RESULTS.glob(configurations.FILE))]
    if not tables:
        pytest.skip("no table of a GPU has been recorded yet")
    for table in tables:
        record = find(table.place.device)
        assert record is not None
        for shape, times in table.shapes.items():
            problem, m = key.problem_of(shape)
            if set(times) >= set(candidates(problem, m, record)):
                best = min(times[each.config] for each in short_list(problem, m, record))
                assert best <= min(times.values()) * (1 + NOISE), shape
