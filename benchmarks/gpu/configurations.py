"""Every configuration of a few products, timed: what the cost model's short list is compared with.

The times of a shape go into ``gpu_configurations.json`` beside the results, a table as ``kbit tune`` writes, which
tests/test_tuner.py reads. A shape for which the time did not suffice goes on with the next run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from gpu.contenders import GROUP
from gpu.session import Row, Session
from kbit_inductor.kernels.triton.config import Config
from kbit_inductor.lowering.cost.device import DeviceRecord, find
from kbit_inductor.lowering.cost.measure import record_of
from kbit_inductor.lowering.cost.short_list import candidates, short_list
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.tuner.gpu_timer import gpu_timer
from kbit_inductor.lowering.tuner.key import Place, place_of, shape_key
from kbit_inductor.lowering.tuner.table import Table, TableError, Times
from kbit_inductor.lowering.tuner.tune import tune

POINTS = ((8192, 8192, 4, 1), (8192, 8192, 4, 16), (4096, 14336, 3, 1), (8192, 8192, 4, 256), (4096, 4096, 2, 64))  # N, K, bits, M
TINY = ((64, 256, 4, 1),)
FILE = "gpu_configurations.json"


def measure(session: Session) -> None:
    """A row for each product: how many configurations were timed, and how good the short list is."""
    place, record = _machine(session)
    for rows, columns, bits, m in TINY if session.rehearsal else POINTS:
        what: Row = {"n": rows, "k": columns, "bits": bits, "m": m}
        with session.row(what) as there_is_time:
            if there_is_time:
                problem = Problem("linear", "cuda", torch.float16, rows, columns, bits, GROUP)
                session.say(f"all configurations of {rows}×{columns}, {bits} bits, {m} rows of x")
                session.add(what | _all(session, problem, m, place, record))


def _machine(session: Session) -> tuple[Place, DeviceRecord]:
    if not session.rehearsal:
        return place_of(session.device), record_of(session.device)
    record = find("H200")
    assert record is not None
    return Place("none: a rehearsal", "none"), record


def _all(session: Session, problem: Problem, m: int, place: Place, record: DeviceRecord) -> Row:
    listed = [each.config for each in short_list(problem, m, record)]
    configs = list(dict.fromkeys((*listed, *candidates(problem, m, record))))
    file, shape = session.file.with_name(FILE), shape_key(problem, m)
    table = _table(file, place)
    rest = [config for config in configs if config not in table.shapes.get(shape, {})]
    if not session.rehearsal:
        compile_all(problem, m, rest)
    timer = (lambda config: 1e-6) if session.rehearsal else gpu_timer(problem, m, session.device)
    tuned = tune(configs, timer, table.shapes.get(shape), max(0.0, session.seconds_left))
    table.merge(Table(place, {shape: tuned.times}))
    table.write(file)
    return {"timed": len(tuned.times), "configurations": len(configs), "complete": tuned.complete, **_quality(tuned.times, listed)}


def _table(file: Path, place: Place) -> Table:
    """What earlier runs have timed, of the same kernels on the same kind of device."""
    with contextlib.suppress(OSError, TableError):
        if (found := Table.read(file)).place == place:
            return found
    return Table(place)


def _quality(times: Times, listed: Sequence[Config]) -> Row:
    best, found = min(times.values()), min(times.get(config, float("inf")) for config in listed)
    return {"best_seconds": best, "listed_seconds": found, "behind": found / best - 1}


def compile_all(problem: Problem, m: int, configs: Sequence[Config]) -> None:
    """Compile ``configs`` in a process for each core, into Triton's cache on disk. What fails fails again when timed."""
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile_one, problem, m, config) for config in configs]:
            done.exception()


def compile_one(problem: Problem, m: int, config: Config) -> object:
    """The kernel that :func:`~kbit_inductor.lowering.tuner.gpu_timer.gpu_timer` launches; nothing is allocated or launched."""
    from kbit_inductor.kernels.layout import group_count
    from kbit_inductor.kernels.triton import launch, linear
    from kbit_inductor.kernels.triton.epilogue import NOTHING
    from kbit_inductor.kernels.words import WordLayout

    layout = WordLayout.of(problem.bits, problem.columns, problem.group_size)
    with torch.device("meta"):
        words = torch.empty(problem.rows, layout.row_words, dtype=torch.int16)
        scale = torch.empty(group_count(problem.columns, problem.group_size), problem.rows, dtype=torch.float16)
        x = launch.activations(torch.empty(m, problem.columns, dtype=problem.dtype), layout, config, launch.NOT_ROUNDED)
        out, one = torch.empty(m, problem.rows, dtype=problem.dtype), torch.empty(1)
        matrix = launch.Matrix(words, scale, scale, one)
        arguments = linear.launch_arguments(x, layout, [matrix], NOTHING, out, config, torch.version.hip is None)
    linear.linear_kernel.warmup(**arguments, grid=(1,))
    return None
