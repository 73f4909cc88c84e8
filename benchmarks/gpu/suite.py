"""The tests that need a GPU, run before anything is timed: the time of a wrong kernel is worth nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from gpu.session import Session

REPOSITORY = Path(__file__).resolve().parents[2]
WORKERS = 8
EXAMPLES = 12  # of each property: each compiles kernels of its own
COUNTS = ("tests", "failures", "errors", "skipped")


def run(session: Session) -> bool:
    """Whether no test failed. Tests that the time did not suffice for are told, and fail nothing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        session.say("the tests that need a GPU")
        limit = max(1.0, session.seconds_left)
        options = {"cwd": REPOSITORY, "env": os.environ | {"KBIT_TEST_EXAMPLES": str(EXAMPLES)}, "timeout": limit, "text": True}
        try:
            done = subprocess.run(_command(report), capture_output=True, check=False, **options)  # type: ignore[call-overload]
        except subprocess.TimeoutExpired:
            session.miss({"tests": "gpu"}, f"they took longer than {limit:.0f} s; give more by --minutes")
            return True
        if not report.exists():
            session.miss({"tests": "gpu"}, (done.stdout + done.stderr).strip()[-2000:])
            return False
        counts = _counts(report)
        session.add({**counts, "failed": _failed(report)})
        return acceptable(counts, session.rehearsal)


def acceptable(counts: dict[str, int], rehearsal: bool) -> bool:
    """Whether something was tested, which a rehearsal cannot, and nothing failed."""
    return not counts["failures"] and not counts["errors"] and (rehearsal or counts["tests"] > counts["skipped"])


def _command(report: Path) -> list[str]:
    """Several workers, where pytest-xdist is there: most of the time goes into compiling kernels."""
    workers = min(WORKERS, len(os.sched_getaffinity(0))) if importlib.util.find_spec("xdist") else 0
    parallel = [f"--numprocesses={workers}"] if workers > 1 else []
    files = sorted(str(path) for path in (REPOSITORY / "tests").glob("test_gpu*.py"))  # where all tests with the marker are
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *parallel, f"--junitxml={report}", *files]


def _counts(report: Path) -> dict[str, int]:
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    found = dict.fromkeys(COUNTS, 0)
    for suite in suites:
        for name in COUNTS:
            found[name] += int(suite.get(name, 0))
    return found


def _failed(report: Path) -> list[str]:
    cases = ElementTree.parse(report).getroot().iter("testcase")
    return [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
