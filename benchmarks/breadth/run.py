"""Compile every architecture of the table and write ``benchmarks/results/breadth.json`` and ``docs/breadth.md``.

``.venv/bin/python benchmarks/breadth/run.py`` measures what is not in the results yet: a process for each architecture, forked from
one that has imported all, with a time limit. See ``--help`` for how to measure some of them, anew, or through Inductor.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a process that is forked must have no threads
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from breadth import report  # noqa: E402
from breadth.architectures import Architecture  # noqa: E402
from breadth.measure import Way, measure  # noqa: E402
from breadth.rows import architectures  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import nn  # noqa: E402

from kbit_inductor.atomic import replacing  # noqa: E402

RESULTS = HERE.parent / "results" / "breadth.json"
WAYS = (Way(4), Way(8, dynamic=True))
LIMIT = 240  # seconds of one architecture


def main() -> None:
    """Measure what is missing, and write both files after each row."""
    options = _parse()
    console = Console()
    if not options.report:
        _warm()
    chosen = [] if options.report else [each for each in architectures() if each.name in options.names or not options.names]
    for each in chosen:
        if each.missing:
            console.print(f"{each.name}: skipped, {each.missing}", highlight=False, soft_wrap=True)
            continue
        ways = (Way(4, inductor=True),) if options.inductor else WAYS
        known = _read()["rows"].get(each.name, {"runs": {}})["runs"]
        runs = _apart(each, [way for way in ways if options.again or way.name not in known])
        for way, found in runs.items():
            console.print(report.line(each.name, way, found), highlight=False, soft_wrap=True)
        _keep(each, runs)
    results = _read()
    _write(results)
    console.print(f"wrote {report.write(results)}", soft_wrap=True)


def _read() -> dict[str, Any]:
    """The results so far, rows in the order of the table."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": {}}
    rows = {each.name: results["rows"][each.name] for each in architectures() if each.name in results["rows"]}
    return {"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows}


def _keep(each: Architecture, runs: dict[str, dict[str, Any]]) -> None:
    """Add ``runs`` to the results, which are read again: another process may measure other rows."""
    results = _read()
    row = results["rows"].setdefault(each.name, {"kind": each.kind, "runs": {}})
    row["runs"].update(runs)
    if each.source:
        row["source"] = each.source
    _write(results)


def _write(results: dict[str, Any]) -> None:
    with replacing(RESULTS) as file:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile tiny models of many architectures.")
    parser.add_argument("names", nargs="*", help="of architectures; all of them if none is given")
    parser.add_argument("--again", action="store_true", help="measure anew what is in the results")
    parser.add_argument("--inductor", action="store_true", help="compile to the end, by Inductor")
    parser.add_argument("--report", action="store_true", help="only write the page")
    return parser.parse_args()


def _warm() -> None:
    """Import and load here what every row needs."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    measure(nn.Sequential(nn.Linear(16, 16)).eval(), {"input": torch.randn(2, 16)}, WAYS[0])


def _apart(each: Architecture, ways: list[Way]) -> dict[str, dict[str, Any]]:
    """The row in a process of its own, by way; what fails is a row with the reason."""
    if not ways:
        return {}
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_work, args=(each, ways, queue))
    process.start()
    process.join(LIMIT)
    found: dict[str, dict[str, Any]] = {}
    while not queue.empty():
        found |= queue.get()
    if process.is_alive():
        process.kill()
    reason = {"failed": "ended without a word" if process.exitcode else f"took longer than {LIMIT} s"}
    return {way.name: found.get(way.name, reason) for way in ways}


def _work(each: Architecture, ways: list[Way], queue: Any) -> None:
    for way in ways:
        try:
            model, inputs = each.build()
            found = measure(model, inputs, way)
        except Exception as error:  # whatever a model raises is the row's result
            place = traceback.extract_tb(error.__traceback__)[-1]
            told = (str(error).splitlines() or [""])[0]
            found = {"failed": f"{type(error).__name__}: {told[:300]} ({Path(place.filename).name}:{place.lineno})"}
        queue.put({way.name: found})


if __name__ == "__main__":
    main()
