"""A :mod:`cpu.worker` as the process that started it sees it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


class Process:
    """A worker that can be asked."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, int]) -> None:
        self.process = process
        self.ready = ready

    @classmethod
    @contextlib.contextmanager
    def start(cls, folder: Path, variant: str, length: int) -> Iterator[Process]:
        """Start one and wait until it is ready; ends it at the end of the block.

        Raises:
            RuntimeError: it ended before it was ready; the message is the last line it wrote.
        """
        command = [sys.executable, str(WORKER), str(folder), variant, str(length)]
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, env=environment, stderr=errors, **pipes) as process:
            try:
                yield cls(process, _answer(process)["ready"])
            except EOFError:
                errors.seek(0)
                raise RuntimeError((errors.read().strip().splitlines() or ["it ended without a word"])[-1]) from None
            finally:
                process.stdin.close()  # type: ignore[union-attr]

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer to a question."""
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return _answer(self.process)


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON; libraries may print other things."""
    for line in process.stdout:  # type: ignore[union-attr]
        if line.startswith("{"):
            return dict(json.loads(line))
    raise EOFError
