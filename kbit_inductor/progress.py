"""A progress bar on stderr for work that takes more than a second."""

from __future__ import annotations

import time
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

PATIENCE = 1.0  # seconds before anything is shown


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
