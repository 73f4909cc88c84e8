"""Measure the configurations of a model's products on a GPU, so that no launch has to guess: what ``kbit tune`` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kbit_inductor.errors import InvalidOptionError, NotATuningTableError
from kbit_inductor.logs import logger
from kbit_inductor.lowering.problem import Problem
from kbit_inductor.lowering.registry import choose
from kbit_inductor.lowering.tuner import lookup
from kbit_inductor.lowering.tuner.key import bucket, shape_key
from kbit_inductor.lowering.tuner.store import Store, user_store
from kbit_inductor.lowering.tuner.table import Table, TableError
from kbit_inductor.lowering.tuner.tune import LIMIT

ROWS = (1, 16, 64, 256, 2048)
log = logger("kernels")


@dataclass(frozen=True)
class TunedShape:
    """What was measured of one shape.

    Attributes:
        shape: its name in the table.
        tried: configurations that were measured.
        dropped: configurations that do not fit on the device, and why.
        seconds: of the fastest; None where none fits.
        complete: whether all of the short list were tried.
        interrupted: whether a keyboard interrupt ended it.
    """

    shape: str
    tried: int
    dropped: tuple[str, ...]
    seconds: float | None
    complete: bool
    interrupted: bool


def gpu_of(device: str | torch.device) -> torch.device:
    """A GPU of this machine.

    Raises:
        InvalidOptionError: it is none.
    """
    place = torch.device(device) if str(device).partition(":")[0] == "cuda" else None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if place is None or (place.index or 0) >= count:
        raise InvalidOptionError(
            f"only kernels of a GPU are tuned, and {str(device)!r} is none of the {count} that torch finds here; "
            "times of another machine are taken over by kbit tune --import"
        )
    return place if place.index is not None else torch.device("cuda", torch.cuda.current_device())


def tune(
    problems: Sequence[Problem],
    rows: Sequence[int] = ROWS,
    device: str | torch.device = "cuda",
    limit: float = LIMIT,
    exhaustive: bool = False,
    store: Store | None = None,
) -> Iterator[TunedShape]:
    """Measure each of ``problems`` for each bucket of ``rows`` of x, the short list of the cost model, and keep the times.

    What was measured is kept as soon as its shape is done, also when it is interrupted; that shape is then the last.

    Args:
        problems: as of :func:`kbit_inductor.launches.launches`.
        rows: numbers of rows of x.
        device: a GPU of this machine.
        limit: seconds for each shape and number of rows.
        exhaustive: measure all configurations that fit, without a limit.
        store: where times are kept; by default ``$KBIT_CACHE_DIR/tuning``.

    Raises:
        InvalidOptionError: there is no such GPU, or it is one that the kernels do not run on.
    """
    place, store = gpu_of(device), store or user_store()
    if limit <= 0 or any(m < 1 for m in rows):
        raise InvalidOptionError(f"tuning takes a limit above 0 and rows from 1; they are {limit!r} and {list(rows)!r}")
    for problem in problems:
        choice = choose(problem)
        if choice.kernel.name != "triton":
            if choice.kernel.name != "reference":
                continue  # another kernel, which is not cut by configurations
            raise InvalidOptionError(f"there is nothing to tune: the Triton kernel {dict(choice.rejected)['triton']}")
        for m in dict.fromkeys(map(bucket, rows)):
            tuned = lookup.tune_shape(problem, m, place, store, limit, exhaustive)
            lookup.forget()
            finite = [seconds for seconds in tuned.times.values() if seconds < float("inf")]
            dropped = tuple(f"{config}: {why}" for config, why in tuned.dropped)
            best = min(finite, default=None)
            yield TunedShape(shape_key(problem, m), len(tuned.times), dropped, best, tuned.complete, tuned.interrupted)
            if tuned.interrupted:
                return


def export_times(target: Path, store: Store | None = None) -> int:
    """Write all times that were measured on this machine to a folder, a file for each device; returns how many files."""
    target.mkdir(parents=True, exist_ok=True)
    tables = list((store or user_store()).tables())
    for table in tables:
        table.write(target / table.place.file_name)
    return len(tables)


def import_times(source: Path, store: Store | None = None) -> int:
    """Take over times that :func:`export_times` has written, a file or a folder of them; returns how many shapes.

    Times of other devices and of other versions of the kernel are kept too, and used where they hold.

    Raises:
        NotATuningTableError: a file that is none of its format, or no file at all.
    """
    paths = sorted(source.glob("*.json")) if source.is_dir() else [source]
    try:
        tables = [Table.read(path) for path in paths]
    except (OSError, TableError) as error:
        raise NotATuningTableError(f"{source} cannot be imported: {error}; give what `kbit tune --export` wrote") from error
    if not tables:
        raise NotATuningTableError(f"{source} holds no table of times; give what `kbit tune --export` wrote")
    kept = store or user_store()
    for table in tables:
        kept.add(table)
    lookup.forget()
    return sum(len(table.shapes) for table in tables)
