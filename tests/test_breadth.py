"""The table of architectures: the page is what the results say, they are right, and some rows hold here too."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the architectures are those of transformers")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from breadth import report  # noqa: E402
from breadth.measure import Way, measure  # noqa: E402
from breadth.peers import Peer  # noqa: E402
from breadth.products import ConstantProducts  # noqa: E402
from breadth.rows import architectures  # noqa: E402

RESULTS: dict[str, Any] = json.loads((REPOSITORY / "benchmarks" / "results" / "breadth.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_results_say() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.render(RESULTS)


def test_every_measured_row_is_within_its_bound() -> None:
    runs = {(name, way): run for name, row in RESULTS["rows"].items() for way, run in row["runs"].items()}
    measured = {key: run for key, run in runs.items() if "failed" not in run}
    assert not [key for key, run in measured.items() if run["error"] > run["bound"]]
    # If rounding the weights moved the result by less, the bound would tell nothing.
    assert all(report.is_right(run) for run in measured.values())
    assert not [key for key, run in runs.items() if run.get("graph_breaks") or run.get("recompiles")]


def test_every_row_is_measured_and_what_is_not_matched_is_explained() -> None:
    kinds = {each.name: each.kind for each in architectures()}
    assert {name: row["kind"] for name, row in RESULTS["rows"].items()} == kinds
    runs = [run for row in RESULTS["rows"].values() for run in row["runs"].values() if "failed" not in run]
    assert all(product["reasons"] for run in runs for product in run["unmatched"])


def test_a_row_of_a_library_that_is_not_there_says_so() -> None:
    assert "not_there is not installed" in Peer("a model", "not_there").missing
    assert (
        not Peer("a model", "torch").missing and Peer("a model", "torch").source == f"torch {importlib.metadata.version('torch')}"
    )


# A relative position as einsum, a kernel with a weight norm in groups, convolutions.
@pytest.mark.parametrize("name", ["xlnet", "wav2vec2", "resnet"])
@pytest.mark.usefixtures("one_thread_without_grad")
def test_an_architecture(name: str) -> None:
    (each,) = (one for one in architectures() if one.name == name)
    model, inputs = each.build()
    found = measure(model, inputs, Way(4))
    assert report.is_right(found) and found["moved"] > 10 * found["bound"]
    assert found["matched"] == found["total"] - sum(product["multiply_adds"] for product in found["unmatched"])
    assert all(product["reasons"] for product in found["unmatched"])
    assert found["graph_breaks"] == found["recompiles"] == 0


@torch.no_grad()
def test_products_with_a_constant_are_counted_and_no_others() -> None:
    linear, conv = nn.Linear(8, 6), nn.Conv1d(3, 4, 2, groups=1)
    names = {**dict(linear.named_parameters(prefix="linear")), **dict(conv.named_parameters(prefix="conv"))}
    x, signal, z = torch.randn(5, 8), torch.randn(2, 3, 7), torch.randn(5, 6)
    with ConstantProducts(names) as counter:
        y = linear(x)
        y @ y.t()
        conv(signal)
        z @ (linear.weight * 2)
    assert dict(counter.found) == {
        ("addmm", frozenset(["linear.weight"])): 5 * 8 * 6,
        ("convolution", frozenset(["conv.weight"])): 2 * 6 * 4 * 3 * 2,
        ("mm", frozenset(["linear.weight"])): 5 * 6 * 8,
    }
