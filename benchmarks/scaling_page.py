"""Write the tables of docs/scaling.md from what ``kbit scaling`` has written: ``python benchmarks/scaling_page.py FOLDER``.

JSON and picture are copied from the folder into ``benchmarks/results`` and ``docs``.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page import replace

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "scaling.md"


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The tables of the page."""
    bits = sorted({row["bits"] for row in results["rows"] if row["bits"]})
    yield f"Perplexity:\n\n| model | parameters | float16 | format | {' | '.join(f'{k} bits' for k in bits)} |"
    yield "| --- | ---: | ---: | --- |" + " ---: |" * len(bits)
    for exact in (row for row in results["rows"] if row["bits"] is None):
        for law in results["laws"]:
            found = {
                row["bits"]: row for row in results["rows"] if (row["model"], row["format"]) == (exact["model"], law["format"])
            }
            cells = " | ".join(f"{found[k]['perplexity']:.2f}" if k in found else "" for k in bits)
            yield f"| {exact['model']} | {exact['parameters']} | {exact['perplexity']:.2f} | {law['format']} | {cells} |"
    names = list(results["laws"][0]["values"])
    yield f"\nThe fitted parameters, with 95 % intervals:\n\n| format | {' | '.join(names)} | misfit, nats |"
    yield "| --- |" + " ---: |" * (len(names) + 1)
    for law in results["laws"]:
        cells = (f"{law['values'][name]:.3g} ({low:.3g} … {high:.3g})" for name, (low, high) in law["intervals"].items())
        yield f"| {law['format']} | {' | '.join(cells)} | {law['misfit']:.3f} |"
    for law in results["laws"]:
        yield f"\nThe best bits at each total size, {law['format']}:\n\n| total, Mbit | bits | perplexity | of the fits | |"
        yield "| ---: | ---: | ---: | ---: | --- |"
        for choice in law["choices"]:
            beyond = "no model of this size was measured" if choice["extrapolated"] else ""
            sizes = f"{choice['total_bits'] / 1e6:.1f} | {choice['bits']} | {math.exp(choice['loss']):.1f}"
            yield f"| {sizes} | {choice['share']:.0%} | {beyond} |"


def main(folder: Path) -> None:
    """Copy, and replace what stands between the markers in the page."""
    for name, target in (("scaling.json", REPOSITORY / "benchmarks" / "results"), ("scaling.png", REPOSITORY / "docs")):
        shutil.copy(folder / name, target / name)
    replace(PAGE, "results", markdown(json.loads((folder / "scaling.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
