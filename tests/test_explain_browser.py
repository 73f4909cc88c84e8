"""The page of ``explain`` in a browser: it opens, its search filters, and nothing goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kbit_inductor as kbit

pytest.importorskip("playwright", reason="playwright is not installed: pip install kbit-inductor[browser]")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import browser

if browser.chromium() is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(30))
        self.tiny = nn.Linear(64, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.tiny(x)


def test_the_page_opens_and_filters_without_an_error(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    kbit.explain(Layers().eval(), torch.randn(2, 64), config={"quantizer": "rtn"}, html=report, device="NVIDIA H200")
    with browser.open_page(report) as (page, errors):
        assert "30 of 31" in page.title()
        rows = page.locator("#layers tr")
        shown = page.locator("#layers tr:visible")
        assert (rows.count(), shown.count()) == (31, 31)
        page.fill("#search", "LAYERS.2")
        assert shown.count() == 11  # 2 and 20 to 29
        page.fill("#search", "too small")
        assert shown.all_inner_texts()[0].startswith("tiny") and shown.count() == 1
        page.fill("#search", "no such layer")
        assert shown.count() == 0
        page.fill("#search", "")
        assert shown.count() == 31
        details = page.locator("details").first
        assert not details.locator("pre").is_visible()
        details.locator("summary").click()
        assert details.locator("pre").is_visible()
        assert page.locator("#layers .bar").count() == 61  # bytes of all, times of those that are packed
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, "the page is wider than the window"
    assert errors == []
