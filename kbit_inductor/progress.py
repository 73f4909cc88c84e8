"""What is shown on stderr while work takes long: a bar where steps can be counted, a line where they cannot."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

PATIENCE = 1.0  # seconds before anything is shown
T = TypeVar("T")


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say ``what`` is being waited for, where stderr is a terminal, until it is over."""
    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield


def first_awaited(stream: Iterable[T], count: int, what: str) -> Iterator[T]:
    """``stream``, of whose first ``count`` elements it is said that ``what`` is being waited for."""
    rest = iter(stream)
    with waiting(what):
        first = list(itertools.islice(rest, count))
    yield from first
    yield from rest


class Progress:
    """Counts steps of ``what`` and shows a bar once :data:`PATIENCE` is over. ``total`` is None where it is not known."""

    def __init__(self, total: int | None, what: str) -> None:
        self._total = total
        self._what = what
        self._done = 0
        self._start = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        self._console = Console(stderr=True)

    def __enter__(self) -> Progress:
        return self

    def advance(self, step: str) -> None:
        """Count ``step``, a layer for one, as done."""
        self._done += 1
        if self._bar is None and self._console.is_terminal and time.monotonic() - self._start > PATIENCE:
            text = TextColumn(self._what), TextColumn("{task.description}")
            columns = (text[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text[1])
            self._bar = rich.progress.Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(step, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, description=step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
