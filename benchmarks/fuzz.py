"""Drawn examples for as long as one likes, added to those of before in ``results/fuzz.json``, and a table of docs/testing.md.

    python benchmarks/fuzz.py --minutes 20

With ``--minutes 0`` nothing is drawn, and the table is written anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page import replace

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE, RESULTS = REPOSITORY / "docs" / "testing.md", REPOSITORY / "benchmarks" / "results" / "fuzz.json"
CHECKED = {
    "packing": "a packed weight has the shape of the float one, and is exact where k bits hold it",
    "kernels": "a kernel is within the bound of its definition",
    "models": "a model means what it meant, and each product is within its bound",
}


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What all ``runs`` drew together, in Markdown."""
    lines = ["| what is checked | examples | seconds | that failed |", "|---|---:|---:|---:|"]
    for name, what in CHECKED.items():
        lines.append(_row(what, [run[name] for run in runs]))
    return [*lines, _row("together", [run[name] for run in runs for name in CHECKED])]


def _row(what: str, outcomes: Sequence[dict[str, Any]]) -> str:
    failed = sum(bool(outcome["failure"]) for outcome in outcomes)
    return f"| {what} | {sum(o['examples'] for o in outcomes)} | {sum(o['seconds'] for o in outcomes):.0f} | {failed} |"


def main() -> None:
    """Draw, and write down what came of it; ends as the drawing does, with 1 where an example failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    minutes = parser.parse_args().minutes
    command = [sys.executable, "-m", "kbit_inductor.testing.fuzz", "--minutes", str(minutes), "--record", str(RESULTS)]
    failed = subprocess.run(command).returncode if minutes else 0
    replace(PAGE, "fuzz", table(json.loads(RESULTS.read_text(encoding="utf-8"))))
    sys.exit(failed)


if __name__ == "__main__":
    main()
