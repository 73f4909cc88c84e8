"""The table as a page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "breadth.md"
VISION = ("vision", "torchvision", "timm")
TARGETS = {True: 0.95, False: 0.99}  # of vision, and of the others
HEADER = """# Architectures

Tiny random models of the architectures of transformers, torchvision, timm and diffusers, and layers of torch.nn, compiled with kbit
and compared with themselves in eager on the weights that the packed ones stand for. Written by `python benchmarks/breadth/run.py`;
all of it is from `benchmarks/results/breadth.json`. Rows of a library that is not installed are skipped and stay as they were.
To install all, with torch left alone:

```
pip install -c constraints.txt -e '.[breadth]'
pip install -c constraints.txt --no-deps torchvision timm diffusers
```

```python
import torch
from torch import nn

import kbit_inductor as kbit

model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)).eval()
patches, depthwise = kbit.explain(model, torch.randn(1, 3, 16, 16), config={"min_elements": 0}).layers
assert patches.matched and not depthwise.matched
print(depthwise.reasons)  # why it stays in float
```
"""
NOTES = """
* matched: multiply–adds of products with a side that comes from parameters alone, as torch counts them at each operator of a
  call, before the passes and after. Products that Dynamo does not capture count as not matched.
* error: the largest relative error of an output, `‖a − e‖ / ‖e‖`. Activations stay in float32, so nothing but the order of sums
  differs. The bound is a unit roundoff for each term of a packed product, all products together.
* moved: how far 4 bits move the output of a model of random weights; it has to be above the bound, or the two would not be told
  apart.
* breaks: graph breaks beyond those that the model has with a backend that does nothing. recompiled: graphs made in a second call,
  of another batch size where sizes are dynamic, beyond those too.
* Passes and operators are run one by one; the rows with an error in the last column are compiled by Inductor to the end as well.
"""
BELOW = f"""## Less matched than is wanted

Wanted is {TARGETS[True]:.0%} in rows of vision, {TARGETS[False]:.0%} in others. A depthwise convolution has a matrix of one row
for each channel, and few terms. As a product it would first lay its input out once for each term, to save bits of weights that are
a small part of the model's; so it stays PyTorch's. How much of a model it is depends on how wide the model is.
"""
COLUMNS = (
    "architecture", "kind", "matched", "error, 4 bits", "error, 8 bits, dynamic", "bound", "moved", "breaks", "recompiled", "fused",
    "Inductor",
)  # fmt: skip


def write(results: dict[str, Any]) -> Path:
    """Write the page and return where."""
    PAGE.write_text(render(results), encoding="utf-8")
    return PAGE


def render(results: dict[str, Any]) -> str:
    """The page for ``results``."""
    rows: dict[str, Any] = results["rows"]
    parts = [
        HEADER,
        f"{', '.join(_versions(results))}.\n",
        *_summary(rows),
        "",
        _cells(COLUMNS),
        "|" + "---|" * len(COLUMNS),
    ]
    parts += [_row(name, row) for name, row in rows.items()]
    return "\n".join([*parts, NOTES, *_below(rows), *_unmatched(rows), *_failed(rows)]) + "\n"


def _versions(results: dict[str, Any]) -> list[str]:
    """Of torch, transformers and the other libraries."""
    sources = dict.fromkeys(row["source"] for row in results["rows"].values() if "source" in row)
    return [f"torch {results['torch']}", f"transformers {results['transformers']}", *sources]


def line(name: str, way: str, found: dict[str, Any]) -> str:
    """What is printed of one measurement."""
    if "failed" in found:
        return f"{name}, {way}: {found['failed']}"
    return (
        f"{name}, {way}: {_share(found):.4f} matched, error {found['error']:.1e}, bound {found['bound']:.1e}, "
        f"{found['graph_breaks']} breaks, {found['recompiles']} recompiled"
    )


def is_right(found: dict[str, Any]) -> bool:
    """Whether a measurement is within its bound, and the bound is less than what rounding the weights does."""
    return "failed" not in found and found["error"] <= found["bound"] < found["moved"]


def _share(found: dict[str, Any]) -> float:
    return float(found["matched"] / found["total"]) if found["total"] else 1.0


def _summary(rows: dict[str, Any]) -> Iterator[str]:
    for vision, title in ((False, "text, audio, several kinds at once, diffusion and layers"), (True, "vision")):
        chosen = [row for row in rows.values() if (row["kind"] in VISION) == vision]
        runs = [run for row in chosen for run in row["runs"].values()]
        shares = [_share(row["runs"]["4 bits"]) for row in chosen if "failed" not in row["runs"].get("4 bits", {"failed": ""})]
        above = sum(share >= TARGETS[vision] for share in shares)
        yield (
            f"* {len(chosen)} architectures of {title}: {sum(map(is_right, runs))} of {len(runs)} runs within the bound, "
            f"{above} with {TARGETS[vision]:.0%} or more of the multiply–adds matched."
        )


def _row(name: str, row: dict[str, Any]) -> str:
    runs = row["runs"]
    plain = next((run for run in runs.values() if "failed" not in run), None)
    if plain is None:
        return _cells((name, row["kind"], "failed", *[""] * (len(COLUMNS) - 3)))
    fused = ", ".join(f"{kind} {count}" for kind, count in sorted(plain["fusions"].items()))
    breaks, recompiled = (sum(run.get(key, 0) for run in runs.values()) for key in ("graph_breaks", "recompiles"))
    errors = [_error(runs.get(way)) for way in ("4 bits", "8 bits, dynamic")]
    cells = (
        name, row["kind"], f"{_share(plain):.2%}", *errors, f"{plain['bound']:.0e}", f"{plain['moved']:.0e}", str(breaks),
        str(recompiled), fused, _error(runs.get("4 bits, Inductor")),
    )  # fmt: skip
    return _cells(cells)


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _error(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    return "failed" if "failed" in run else f"{run['error']:.0e}" + ("" if is_right(run) else " **above**")


def _below(rows: dict[str, Any]) -> Iterator[str]:
    """The rows with less matched than is wanted, one by one."""
    yield BELOW
    for name, row in rows.items():
        run = row["runs"].get("4 bits", {})
        if not run.get("total") or _share(run) >= TARGETS[row["kind"] in VISION]:
            continue
        kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for product in run["unmatched"]:
            kinds["; ".join(product["reasons"]) or "not captured"].append(product)
        told = [
            f"{len(products)} {why} ({sum(each['multiply_adds'] for each in products) / run['total']:.1%} of the multiply–adds, "
            f"{sum(each['parameters'] for each in products) / run['parameters']:.2%} of the parameters)"
            for why, products in kinds.items()
        ]
        yield f"* {name}, {_share(run):.1%}: {'; '.join(told)}"
    yield ""


def _unmatched(rows: dict[str, Any]) -> Iterator[str]:
    """The products left in float, those of one operator and reason together."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, row in rows.items():
        for product in row["runs"].get("4 bits", {}).get("unmatched", ()):
            why = "; ".join(product["reasons"]) or "not captured"
            total = row["runs"]["4 bits"]["total"]
            found[product["operator"], why].append(f"{name} `{product['weights'][0]}` {product['multiply_adds'] / total:.1%}")
    yield "## What stays in float\n\nThe weight and its share of the model's multiply–adds.\n"
    for (operator, why), products in found.items():
        yield f"* {operator}, {why}: {'; '.join(products)}"


def _failed(rows: dict[str, Any]) -> Iterator[str]:
    failed = [(name, way, run["failed"]) for name, row in rows.items() for way, run in row["runs"].items() if "failed" in run]
    if failed:
        yield "\n## What failed\n"
        yield from (f"* {name}, {way}: {reason}" for name, way, reason in failed)
