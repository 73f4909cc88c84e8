"""What commands write into pages: tables between comments, and what they count."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import fuzz
import page
import torch_versions

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a.Group" name="two"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_b" name="three"><failure message="wrong"/></testcase>
<testcase classname="tests.test_b" name="four"><error message="broken"/></testcase>
<testcase classname="" name="tests.test_c"><skipped message="no browser"/></testcase>
</testsuite></testsuites>"""


def test_a_table_takes_the_place_of_the_old_one_alone(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "above\n<!-- one: begin -->\nold\n<!-- one: end -->\n<!-- two: begin -->\nother\n<!-- two: end -->\nbelow\n"
    )
    for _ in range(2):
        page.replace(document, "one", ["new", "rows"])
    expected = "above\n<!-- one: begin -->\nnew\nrows\n<!-- one: end -->\n<!-- two: begin -->\nother\n<!-- two: end -->\nbelow\n"
    assert document.read_text() == expected
    with pytest.raises(SystemExit, match=r"page\.md has no lines <!-- three: begin -->"):
        page.replace(document, "three", [])
    assert document.read_text() == expected


def test_the_outcomes_of_a_suite_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    counted = torch_versions.outcomes([report, report])
    files = len(list(Path(__file__).parent.glob("test_*.py")))
    assert counted == {"run": 3, "files": files, "passed": 2, "failed": 4, "skipped": 4}
    row = {"python": "3.11", "transformers": "5", **counted}
    *_, older, newer = torch_versions.table({"2.15.0": row, "2.9.0": row})
    assert older == f"| 2.9.0 | 3.11 | 5 | 3 of {files} | 2 | 4 | 4 |" and newer.startswith("| 2.15.0")


def test_what_was_drawn_is_added_up() -> None:
    right, wrong = ({"examples": 5, "seconds": 1.5, "failure": failure} for failure in ("", "ValueError: …"))
    *_, models, together = fuzz.table([dict.fromkeys(fuzz.CHECKED, right), {**dict.fromkeys(fuzz.CHECKED, right), "models": wrong}])
    assert models.endswith("| 10 | 3 | 1 |") and together == "| together | 30 | 9 | 1 |"
