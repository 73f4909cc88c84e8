"""How the test suite ended on the torch of this interpreter: a row of ``results/torch_versions.json`` and of docs/status.md.

    make test
    python benchmarks/torch_versions.py build/tests.xml

``make test-newest`` does both for the newest torch. Several files are parts of one run.
"""

from __future__ import annotations

import json
import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from page import replace

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE, RESULTS = REPOSITORY / "docs" / "status.md", REPOSITORY / "benchmarks" / "results" / "torch_versions.json"
OUTCOMES = ("passed", "failed", "skipped")


def outcomes(reports: Sequence[Path]) -> dict[str, int]:
    """Of how many files of tests there are pytest's ``reports`` tell, and how many tests ended how."""
    counted: Counter[str] = Counter()
    told = set()
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case}
            counted["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
            file = case.attrib["classname"] or case.attrib["name"]  # a file that is skipped as a whole is a case without a class
            told.add(file.split(".")[1])
    files = len(list((REPOSITORY / "tests").glob("test_*.py")))
    return {"run": len(told), "files": files, **{name: counted[name] for name in OUTCOMES}}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each torch, in Markdown."""
    lines = ["| torch | Python | transformers | files of tests | passed | failed | skipped |", "|---|---|---|---:|---:|---:|---:|"]
    for version in sorted(results, key=torch.torch_version.TorchVersion):
        row = results[version]
        ended = " | ".join(str(row[outcome]) for outcome in OUTCOMES)
        lines.append(f"| {version} | {row['python']} | {row['transformers']} | {row['run']} of {row['files']} | {ended} |")
    return lines


def main() -> None:
    """Count, and write it down."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    files = [Path(argument) for argument in sys.argv[1:]]
    if not files:
        sys.exit("name the files that pytest --junitxml wrote")
    about = {"python": platform.python_version(), "transformers": transformers.__version__}
    results[torch.__version__] = {**about, **outcomes(files)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    replace(PAGE, "torch", table(results))


if __name__ == "__main__":
    main()
