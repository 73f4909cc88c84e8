"""A progress bar on stderr for packing that takes more than a second."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PATIENCE = 1.0  # seconds before anything is shown


class PackingProgress:
    """Counts packed weights and shows a bar once :data:`PATIENCE` is over."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._console = Console(stderr=True)

    def __enter__(self) -> PackingProgress:
        return self

    def advance(self, layer: str) -> None:
        """Count one weight, of ``layer``, as packed."""
        self._done += 1
        if self._bar is None and self._console.is_terminal and time.monotonic() - self._start > PATIENCE:
            text = TextColumn("packing weights"), TextColumn("{task.description}")
            columns = (text[0], BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text[1])
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(layer, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, description=layer)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
