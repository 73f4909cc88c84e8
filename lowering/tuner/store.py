"""Where tables of measured times are kept: those of the user, those that come with the package, and those of this process."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kbit_inductor.kernels.cpu.build import cache_dir
from kbit_inductor.lowering.tuner.key import Place
from kbit_inductor.lowering.tuner.table import Table, TableError

SHIPPED = Path(__file__).with_name("tables")
PATIENCE = 10.0  # seconds that another process may take to write

log = logging.getLogger("kbit_inductor.kernels")


def user_store() -> Store:
    """The store of this process in the folder that the environment names: what cannot be written there is kept by it."""
    return _store_in(cache_dir() / "tuning")


class Store:
    """Tables by place: the user's folder, then the package's.

    Args:
        folder: the user's.
        shipped: of the package.
    """

    def __init__(self, folder: Path, shipped: Path = SHIPPED) -> None:
        self.folder = folder
        self.shipped = shipped
        self._unwritten: dict[Place, Table] = {}
        self._lock = threading.Lock()

    def table(self, place: Place) -> Table:
        """All that is known of a place. Where several have a shape, times of the user win over the package's."""
        found = Table(place)
        for folder in (self.shipped, self.folder):
            if (table := self._read(folder / place.file_name)) is not None and table.place == place:
                found.merge(table)
        with self._lock:
            if (unwritten := self._unwritten.get(place)) is not None:
                found.merge(unwritten)
        return found

    def add(self, table: Table) -> None:
        """Add times to the user's file. Where it cannot be written they are kept by this process, and the log says so."""
        path = self.folder / table.place.file_name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._writing(path):
                whole = self._read_or_set_aside(path) or Table(table.place)
                whole.merge(table)
                whole.write(path)
        except OSError as error:  # a lock that another process holds for too long among them
            with self._lock:
                first = not self._unwritten
                self._unwritten.setdefault(table.place, Table(table.place)).merge(table)
            if first:
                log.warning(
                    "measured times cannot be written to %s (%s), so they go with this process; set KBIT_CACHE_DIR to a folder "
                    "that can be written", self.folder, error,
                )  # fmt: skip

    def tables(self) -> Iterator[Table]:
        """Every table of the user's folder."""
        for path in sorted(self.folder.glob("*.json")):
            if (table := self._read(path)) is not None:
                yield table

    def _read(self, path: Path) -> Table | None:
        """The table of a file, None where there is none. A damaged one is set aside, unless another process has just mended it."""
        try:
            return Table.read(path)
        except OSError:
            return None
        except TableError as error:
            log.warning("%s is damaged and set aside: %s; `kbit tune` measures again", path, error)
        try:
            with self._writing(path):
                return self._read_or_set_aside(path)
        except OSError:
            return None

    def _read_or_set_aside(self, path: Path) -> Table | None:
        """As :meth:`_read`, while no other process writes."""
        try:
            return Table.read(path)
        except OSError:
            return None
        except TableError:
            path.replace(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
            return None

    def _writing(self, path: Path) -> contextlib.AbstractContextManager[Any]:
        from filelock import FileLock  # who only reads need not wait for the import

        return FileLock(f"{path}.lock", timeout=PATIENCE)


@functools.cache
def _store_in(folder: Path) -> Store:
    return Store(folder)
