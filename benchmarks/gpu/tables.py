"""The results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

Results = dict[str, Any]
NONE = "–"


def tables(results: Results) -> Iterator[Table]:
    """One for each shape of a layer and each model, for epilogues, configurations, what is missing, and the targets."""
    layers = results.get("layers", {}).get("rows", [])
    for shape in dict.fromkeys((row["n"], row["k"]) for row in layers):
        yield _layer(shape, [row for row in layers if (row["n"], row["k"]) == shape])
    if rows := results.get("epilogue", {}).get("rows", []):
        head = ("layer", "rows of x", "bits", "plain, µs", "fused, µs", "cost")
        lines = [
            (
                f"{r['n']} × {r['k']}",
                f"{r['m']}",
                f"{r['bits']}",
                _us(r["plain_seconds"]),
                _us(r["fused_seconds"]),
                f"{r['cost']:.1%}",
            )
            for r in rows
        ]
        yield _table("bias, SiLU, factor and residual sum in the product", head, lines)
    if rows := results.get("configurations", {}).get("rows", []):
        head = ("layer", "rows of x", "bits", "timed", "of", "best, µs", "best of the short list, µs")
        lines = [
            (f"{r['n']} × {r['k']}", f"{r['m']}", f"{r['bits']}", f"{r['timed']}", f"{r['configurations']}", _us(r["best_seconds"]),
             _us(r["listed_seconds"]))
            for r in rows
        ]  # fmt: skip
        yield _table("all configurations", head, lines)
    models = results.get("models", {}).get("rows", [])
    for name in dict.fromkeys(row["model"] for row in models):
        yield _model(name, [row for row in models if row["model"] == name])
    yield _missing(results)
    if "targets" in results:
        lines = [(t["target"], f"{t['least']:.2f}", _number(t["found"]), _verdict(t["met"])) for t in results["targets"]]
        yield _table("targets (set for an H200)", ("", "at least", "found, worst", ""), lines)


def _layer(shape: tuple[int, int], rows: list[Results]) -> Table:
    inputs = sorted({row["m"] for row in rows})
    cells = {(row["contender"], row["m"]): f"{_us(row['seconds'])} ({row['roofline_share']:.0%})" for row in rows}
    names = dict.fromkeys(row["contender"] for row in rows)
    lines = [(name, *(cells.get((name, m), NONE) for m in inputs)) for name in names]
    return _table(f"W {shape[0]} × {shape[1]}: µs (share of the roofline) by rows of x", ("", *map(str, inputs)), lines)


def _model(name: str, rows: list[Results]) -> Table:
    keys = [key for key in rows[0] if key.endswith("_seconds")]
    heads = [f"{key.removesuffix('_seconds').replace('_', ' ')}, ms" for key in keys]
    lines = [
        (
            row["contender"], *(f"{1e3 * row[key]:.3f}" if key in row else NONE for key in keys),
            f"{row['weight_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e9:.2f}", f"{row['bytes_share']:.0%}",
            _number(row.get("perplexity")),
        )
        for row in rows
    ]  # fmt: skip
    return _table(name, ("", *heads, "weights, GB", "peak, GB", "of the bytes' limit, batch 1", "perplexity"), lines)


def _missing(results: Results) -> Table:
    counts: dict[tuple[str, str, str], int] = {}
    for part, found in results.items():
        for gone in found.get("missing", []) if isinstance(found, dict) else []:
            key = (part, str(gone.get("contender", "all")), gone["reason"])
            counts[key] = counts.get(key, 0) + 1
    lines = [(part, who, str(count), reason) for (part, who, reason), count in counts.items()]
    return _table("not measured", ("part", "", "rows", "why"), lines)


def _table(title: str, head: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    table = Table(title=title)
    for position, name in enumerate(head):
        table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "missed"
