"""The long mode of the checks: examples are counted, and one that fails is shrunk, told and kept."""

from __future__ import annotations

import json

from hypothesis import strategies as st
from typer.testing import CliRunner

import kbit_inductor.testing.fuzz as long_mode
from kbit_inductor.testing.fuzz import fuzz


def test_each_property_is_tried_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(long_mode, "BATCH", 3)
    app = long_mode.typer.Typer()
    app.command()(long_mode.main)
    kept, record = tmp_path / "kept", tmp_path / "record.json"
    arguments = ["--minutes", "0.001", "--database", str(kept), "--record", str(record)]
    for _ in range(2):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    runs = json.loads(record.read_text())
    assert len(runs) == 2
    for run in runs:
        assert all(run[name]["examples"] >= 3 and not run[name]["failure"] for name in ("packing", "kernels", "models"))


def test_a_failing_example_is_kept_and_tried_first(tmp_path):
    drawn = []

    def small(data):
        drawn.append(data.draw(st.integers(0, 10**6)))
        assert drawn[-1] < 1000

    first = fuzz(small, 5, tmp_path)
    assert "Draw 1: 1000" in first.failure  # the smallest that fails
    assert list(tmp_path.rglob("*"))
    drawn.clear()
    again = fuzz(small, 5, tmp_path)
    assert drawn[0] == 1000 and again.failure
