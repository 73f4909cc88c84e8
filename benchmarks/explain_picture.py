"""The page of ``explain`` for SmolLM2-135M, a model of 30 layers, as docs/explain.png.

``pip install .[browser]``, a Chromium on PATH, then ``python benchmarks/explain_picture.py``: two minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import smollm2
import torch
from browser import open_page

import kbit_inductor as kbit

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "explain.png"


def main() -> None:
    smollm2.silence()
    model, _ = smollm2.read_package()
    with tempfile.TemporaryDirectory(prefix="kbit-page-") as name:
        report = Path(name) / "report.html"
        config = {"quantizer": "rtn", "overrides": {r"re:.*down_proj": {"bits": 6}}}
        kbit.explain(model, torch.arange(100, 108).view(1, 8), config=config, html=report, device="NVIDIA H200")
        with open_page(report) as (page, errors):
            page.fill("#search", "layers.2")
            page.locator("summary").first.scroll_into_view_if_needed()
            page.evaluate("window.scrollTo(0, 0)")
            page.screenshot(path=PICTURE)
    assert not errors, errors
    print(f"{PICTURE} written")


if __name__ == "__main__":
    main()
