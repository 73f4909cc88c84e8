"""Measured times of one place as a file of JSON, which is written whole or not at all.

    {"format": 1, "device": "NVIDIA H200", "source": "…", "shapes": {shape: [{"seconds": 1e-05, "block_m": 8, …}, …]}}

All times that were measured are kept, so that a tuning that was cut short is gone on with, and so that the cost model can be
compared with what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kbit_inductor.kernels.triton.config import Config
from kbit_inductor.lowering.tuner.key import Place

FORMAT = 1
Times = dict[Config, float]
"""Seconds by configuration. Infinite: it did not fit on the device."""


class TableError(ValueError):
    """A file that holds no table of this format."""


@dataclass
class Table:
    """What was measured at one place.

    Attributes:
        place: where.
        shapes: the times by shape (:func:`~kbit_inductor.lowering.tuner.key.shape_key`).
    """

    place: Place
    shapes: dict[str, Times] = field(default_factory=dict)

    def best(self, shape: str) -> Config | None:
        """The fastest of a shape, None where none was measured."""
        fitting = {config: seconds for config, seconds in self.shapes.get(shape, {}).items() if seconds < float("inf")}
        return min(fitting, key=lambda config: fitting[config]) if fitting else None

    def merge(self, other: Table) -> None:
        """Take over the times of ``other``, which are the newer ones."""
        for shape, times in other.shapes.items():
            self.shapes.setdefault(shape, {}).update(times)

    def dumps(self) -> str:
        """As the text of a file."""
        shapes = {shape: [_entry(*item) for item in times.items()] for shape, times in sorted(self.shapes.items())}
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self.place), "shapes": shapes}, indent=1) + "\n"

    @classmethod
    def loads(cls, text: str) -> Table:
        """From the text of a file.

        Raises:
            TableError: it is none, or of another format.
        """
        try:
            held: dict[str, Any] = json.loads(text)
            if held["format"] != FORMAT:
                raise TableError(f"format {held['format']!r}, not {FORMAT}")
            shapes = {str(shape): dict(map(_item, entries)) for shape, entries in held["shapes"].items()}
            return cls(Place(str(held["device"]), str(held["source"])), shapes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TableError(f"not a table of measured times: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Table:
        """From a file.

        Raises:
            TableError: as :meth:`loads`.
            OSError: it cannot be read.
        """
        try:
            return cls.loads(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise TableError(f"not a table of measured times: {error}") from error

    def write(self, path: Path) -> None:
        """To a file, in one step: whoever reads it meanwhile has the old one or the new one.

        Raises:
            OSError: it cannot be written.
        """
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
            written = Path(file.name)
            try:
                file.write(self.dumps())
                file.flush()
                os.fsync(file.fileno())
                written.replace(path)
            except BaseException:  # an interrupt too
                written.unlink(missing_ok=True)
                raise


def _entry(config: Config, seconds: float) -> dict[str, Any]:
    return {"seconds": seconds if seconds < float("inf") else None, **dataclasses.asdict(config)}


def _item(entry: dict[str, Any]) -> tuple[Config, float]:
    options = dict(entry)
    seconds = options.pop("seconds")
    return Config(**options), float("inf") if seconds is None else float(seconds)
