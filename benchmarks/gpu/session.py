"""One run of the benchmark: where it measures, by which clock, until when, and the file that grows as it goes."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu.clock import Clock

Row = dict[str, Any]
Results = dict[str, Any]
OUT_OF_TIME = "no time was left; give more by --minutes"
GRACE = 15.0  # seconds that a row may go on when the time of its part is over


@dataclass
class Session:
    """What every part of the benchmark is given.

    Attributes:
        device: that is measured, or the CPU of a rehearsal.
        clock: what times.
        file: of the results, written anew after every row.
        end: the ``time.monotonic()`` at which the run is to be over.
        say: told what is done now.
        results: by part, ``{"rows": […], "missing": […]}``, and what :meth:`note` is given.
    """

    device: torch.device
    clock: Clock
    file: Path
    end: float
    say: Callable[[str], None] = lambda what: None
    results: Results = field(default_factory=dict)
    part: str = ""
    part_end: float = 0.0

    @property
    def rehearsal(self) -> bool:
        """Whether nothing is measured: tiny shapes, on a CPU, by a clock that tells no time."""
        return self.clock.rehearsal

    def begin(self, part: str, share: float) -> None:
        """Begin a part that may take this share of the time that is left."""
        self.part = part
        self.part_end = time.monotonic() + share * max(0.0, self.end - time.monotonic())
        self.results[part] = {"rows": [], "missing": []}
        self.write()

    @property
    def seconds_left(self) -> float:
        """Of this part."""
        return self.part_end - time.monotonic()

    def add(self, row: Row) -> None:
        """A row of this part."""
        self.results[self.part]["rows"].append(row)
        self.write()

    def miss(self, what: Row, reason: str) -> None:
        """A row that there is not, and why."""
        self.results[self.part]["missing"].append({**what, "reason": reason})
        self.write()

    def note(self, **values: Any) -> None:
        """Something about the run as a whole."""
        self.results.update(values)
        self.write()

    @contextlib.contextmanager
    def row(self, what: Row) -> Iterator[bool]:
        """Whether there is time to measure ``what``; it is missing where not, or where a library or the GPU refuses."""
        if self.seconds_left <= 0:
            self.miss(what, OUT_OF_TIME)
            yield False
            return
        try:
            with ending(self.seconds_left + GRACE):
                yield True
        except Exception as error:  # whatever a library raises is the reason why it has no row
            lines = str(error).strip().splitlines()
            self.miss(what, f"{type(error).__name__}: {lines[0] if lines else ''}")

    def write(self) -> None:
        """Write all that there is. The file is whole at every moment, so a run that is ended leaves what it had."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.file.with_suffix(".part")
        scratch.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        scratch.replace(self.file)


@contextlib.contextmanager
def ending(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer: a library may tune itself for minutes. In the main thread only."""

    def stop(*_: object) -> None:
        raise TimeoutError(OUT_OF_TIME)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
