"""Damaged files of every format that is read, and saves killed at random moments: how they ended.

    python benchmarks/reliability.py --files 10000 --kills 100

The tests do it (``tests/test_import_damage.py``, ``tests/kills.py``), with more examples than in CI; this writes their counts to
``benchmarks/results/reliability.json`` and the tables of docs/testing.md. ``--formats`` runs some of them and keeps what the file
has of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from page import replace

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE, RESULTS = REPOSITORY / "docs" / "testing.md", REPOSITORY / "benchmarks" / "results" / "reliability.json"
TESTS = REPOSITORY / "tests"
READ = "read"  # a file that was damaged where nothing looks, or whose values are others


def fuzz(files: int, formats: list[str]) -> dict[str, dict[str, int]]:
    """By format: how many of ``files`` damaged files were read, and how many were refused by which error.

    Raises:
        subprocess.CalledProcessError: a file ended in another exception than ours, or took much memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "fuzz.json"
        environment = {**os.environ, "KBIT_TEST_EXAMPLES": str(files), "KBIT_FUZZ_RESULTS": str(results)}
        test = f"{TESTS / 'test_import_damage.py'}::test_damaged_files"
        chosen = [f"{test}[{name}]" for name in formats] or [test]
        command = [sys.executable, "-m", "pytest", "-q", "-n0", *chosen]
        subprocess.run(command, check=True, env=environment)
        found: dict[str, dict[str, int]] = json.loads(results.read_text())
    return found


def kill(kills: int) -> dict[str, int]:
    """What loading found after ``kills`` saves were killed, while two processes saved, and after the disk was full."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, TESTS / "kills.py", Path(folder) / "model", str(kills)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, int] = json.loads(done.stdout)
    return found


def table(results: dict[str, Any]) -> list[str]:
    """What is measured, in Markdown."""
    lines = ["| format | damaged files | read | refused by an error of ours |", "|---|---:|---:|---|"]
    for name, outcomes in sorted(results["files"].items()):
        errors = ", ".join(f"{count} `{error}`" for error, count in outcomes.items() if error != READ)
        lines.append(f"| {name} | {sum(outcomes.values())} | {outcomes.get(READ, 0)} | {errors} |")
    told = results.get("kills", {})
    if told:
        lines += ["", "| saves | loads that found a whole model | half a model |", "|---|---:|---:|"]
        what = f"{told['killed']} killed, {told['read while two save']} loads while two save, {told['disk full']} with a full disk"
        lines.append(f"| {what} | {told['whole']} | {told.get('half', 0)} |")
    return lines


def write(results: dict[str, Any]) -> None:
    """Write the JSON, and the tables of the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    replace(PAGE, "reliability", table(results))


def main() -> None:
    """Run what is asked for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10000, help="damaged files of each format; 0 for none")
    parser.add_argument("--kills", type=int, default=100, help="saves to kill; 0 for none")
    parser.add_argument("--formats", nargs="*", default=[], help="names of tests/test_import_damage.py; all unless told")
    told = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"files": {}, "kills": {}}
    if told.files:
        results["files"] |= fuzz(told.files, told.formats)
    if told.kills:
        results["kills"] = kill(told.kills)
    write(results)


if __name__ == "__main__":
    main()
