"""The results as tables: one form for the terminal, one for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from page import replace
from rich import box
from rich.table import Table

from cpu.ceilings import bandwidth
from cpu.layers import compare, fastest

Results = dict[str, Any]
MARK = "bench-cpu"
PICTURES = {"cpu-layers.png": "Time of a layer against bits", "cpu-decode.png": "What a decoded token's time goes into"}
NONE = "–"


@dataclass(frozen=True)
class Grid:
    """A table of strings; the first column is text, the others figures. ``notes`` are sentences to stand under it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())


def grids(results: Results) -> list[Grid]:
    """All tables of the parts that were measured."""
    parts = {"ceilings": _ceilings, "layers": _layers, "smollm2": _models, "minilm": _minilm, "breakdown": _breakdown}
    return [grid for part, make in parts.items() if part in results for grid in make(results)]


def drawn(grid: Grid) -> Table:
    """A table for the terminal."""
    table = Table(title=grid.title, box=box.SIMPLE, pad_edge=False, title_justify="left")
    for number, head in enumerate(grid.head):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    for row in grid.rows:
        table.add_row(*row)
    return table


def markdown(grid: Grid) -> str:
    """A table for a document."""
    lines = [grid.head, ["---"] + ["---:"] * (len(grid.head) - 1), *grid.rows]
    notes = [f"* {note}" for note in grid.notes]
    return "\n".join([f"**{grid.title}**", "", *("| " + " | ".join(line) + " |" for line in lines), "", *notes]).rstrip()


def write(found: str, document: Path) -> None:
    """Replace what stands between the two markers in ``document``."""
    replace(document, MARK, [found])


def report(results: Results, folder: Path) -> str:
    """All tables for a document in ``folder``, and the pictures that are there."""
    pictures = [f"![{title}]({name})" for name, title in PICTURES.items() if (folder / name).exists()]
    return "\n\n".join([_machine(results), *pictures, *map(markdown, grids(results))])


def summary(results: Results) -> str:
    """The language model alone, for README.md."""
    part = results["smollm2"]
    rows = [
        [
            row["contender"].replace("kbit-", "kbit, bits: "),
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{1 / row['token_seconds']:.0f}",
            f"{part['protocol']['window'] / row['window_seconds']:.0f}",
        ]
        for row in part["rows"]
        if not row["contender"].startswith("transformers-")
    ]
    head = ("", "weights, MB", "decode, tok/s", f"prompt of {part['protocol']['window']}, tok/s")
    return "\n\n".join([_machine(results), markdown(Grid(part["model"], head, rows))])


def _machine(results: Results) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    kernels = f", kernels for {machine['instruction_set']}" if "instruction_set" in machine else ""
    return f"Measured on {machine['cpu']}, {machine['threads']} threads{kernels}; {versions}."


def _ceilings(results: Results) -> Iterator[Grid]:
    found = results["ceilings"]
    rows = [[f"reading, {kind} pages", f"{value / 1e9:.1f} GB/s"] for kind, value in found["read_bandwidth"].items()]
    rows += [[f"{kind} products", f"{value / 1e9:.0f} GOP/s"] for kind, value in found["peaks"].items()]
    yield Grid("What the machine allows", ("", "median"), rows, _reasons(found["missing"].items()))


def _layers(results: Results) -> Iterator[Grid]:
    """For each shape: time by contender and rows of x, then our ratios."""
    part = results["layers"]
    reading = bandwidth(results["ceilings"]) if "ceilings" in results else None
    for shape in _unique((row["rows"], row["columns"]) for row in part["rows"]):
        rows = [row for row in part["rows"] if (row["rows"], row["columns"]) == shape]
        name = f"{shape[0]}×{shape[1]}"
        inputs = _unique(row["inputs"] for row in rows)
        heads = [f"M={count} {'cold' if cold else 'hot'}" for count, cold in _unique((row["inputs"], row["cold"]) for row in rows)]
        medians = {(row["contender"], row["inputs"]): row["seconds"]["median"] for row in rows}
        sizes = {row["contender"]: row["bytes"] for row in rows}
        times = [
            [contender, f"{size / 1e6:.2f}", *(_microseconds(medians.get((contender, count))) for count in inputs)]
            for contender, size in sizes.items()
        ]
        notes = _reasons(
            (gone["contender"], gone["reason"]) for gone in part["missing"] if (gone["rows"], gone["columns"]) == shape
        )
        yield Grid(f"y = x Wᵀ, W {name}: µs", ("", "MB", *heads), times, notes)
        yield _layer_ratios(name, compare(rows, reading))


def _layer_ratios(name: str, rows: Sequence[Results]) -> Grid:
    """Of one shape: a line for each of our contenders, and beside each other what was measured at as many rows of x."""
    inputs = _unique(row["inputs"] for row in rows)
    cells = {(row["contender"], row["inputs"]): row for row in rows}
    heads, columns = [], []
    for count in inputs:
        if count == inputs[0] and rows[0]["of_reading"]:
            heads.append(f"M={count}: of reading its bytes")
            columns.append((count, lambda row: _ratio(row["of_reading"])))
        heads.append(f"M={count}: of the fastest peer")
        columns.append((count, lambda row: f"{_ratio(row['of_best'])} ({_ratio(row['of_same_bits'])})"))
    lines = [
        [contender, *(show(cells[contender, count]) if (contender, count) in cells else NONE for count, show in columns)]
        for contender in _unique(row["contender"] for row in rows)
    ]
    best = {row["inputs"]: row["best"] for row in rows if row["best"]}
    fastest_ones = "; ".join(f"M={count}: {peer}" for count, peer in best.items())
    notes = [f"In brackets: of the fastest peer with as many bits. The fastest of all: {fastest_ones}."]
    return Grid(f"W {name}: our time over others'", ("", *heads), lines, notes if best else ())


def _models(results: Results) -> Iterator[Grid]:
    part = results["smollm2"]
    asked = part["protocol"]
    rows = [
        [
            row["contender"],
            f"{1 / row['token_seconds']:.1f}",
            f"{asked['window'] / row['window_seconds']:.0f}",
            *(
                f"{row[key] / 1e6:.1f}"
                for key in ("weight_bytes", "cache_bytes", "resident_bytes", "peak_bytes", "loading_peak_bytes")
            ),
        ]
        for row in part["rows"]
    ]
    head = ("", "decode, tok/s", "prefill, tok/s", "weights, MB", "cache, MB", "resident, MB", "peak, MB", "loading, MB")
    notes = [
        f"Decode: {asked['new']} tokens, greedy, after a prompt of {len(asked['prompt'])}, batch 1. Prefill: a prompt of "
        f"{asked['window']}. Room for {asked['length']} tokens. Medians of {asked['repeats']} repeats.",
        "Resident, peak, loading: memory of the row's own process when it has answered, the most while it answered, and the most "
        "before, while the model was read, packed and compiled; less what the process had with its libraries imported and no "
        "model.",
    ]
    yield Grid(part.get("model", ""), head, rows, [*notes, *_missing(part)])
    yield from _model_ratios(part)


def _model_ratios(part: Results) -> Iterator[Grid]:
    """Our tokens per second over those of others, as bytes of weights go."""
    ours = [row for row in part["rows"] if row["contender"].startswith("kbit-")]
    peers = [row for row in part["rows"] if not row["contender"].startswith(("kbit-", "transformers-"))]
    ggml = [row for row in peers if row["contender"].startswith("llama.cpp")]
    if not ours or not ggml:
        return
    best = min(peers, key=lambda row: float(row["window_seconds"]))
    rows = []
    for row in ours:
        near = min(ggml, key=lambda peer: abs(peer["weight_bytes"] - row["weight_bytes"]))
        rows.append(
            [
                row["contender"],
                f"{row['weight_bytes'] / 1e6:.1f}",
                f"{near['contender']} ({near['weight_bytes'] / 1e6:.1f} MB)",
                _ratio(near["token_seconds"] / row["token_seconds"]),
                _ratio(best["window_seconds"] / row["window_seconds"]),
            ]
        )
    head = ("", "weights, MB", "llama.cpp's of the nearest size", "decode over it", "prefill over the fastest peer")
    yield Grid("Our tokens per second over others'", head, rows, [f"The fastest peer with the prompt: {best['contender']}."])


def _minilm(results: Results) -> Iterator[Grid]:
    part = results["minilm"]
    shapes = _unique((row["sentences"], row["tokens"]) for row in part["rows"])
    rates = {
        (row["contender"], (row["sentences"], row["tokens"])): row["sentences"] / row["seconds"]["median"] for row in part["rows"]
    }
    correlations = part.get("spearman", {})
    rows = [
        [name, *(f"{rates[name, shape]:.0f}" for shape in shapes), _digits(correlations.get(name.removeprefix("eager-")), 4)]
        for name in _unique(row["contender"] for row in part["rows"])
    ]
    head = ("", *(f"{sentences} × {tokens} tokens" for sentences, tokens in shapes), "Spearman, STS-B")
    notes = [f"No correlations: {part['spearman_missing']}."] if "spearman_missing" in part else []
    yield Grid("all-MiniLM-L6-v2: sentences per second", head, rows, [*notes, *_missing(part)])


def _breakdown(results: Results) -> Iterator[Grid]:
    part = results["breakdown"]
    names = _unique(name for row in part["rows"] for name in row["parts"])
    rows = [
        [row["contender"], f"{1e6 * row['seconds']:.0f}", *(f"{1e6 * row['parts'][name]:.0f}" for name in names)]
        for row in part["rows"]
    ]
    yield Grid("One decoded token: µs", ("", "all", *names), rows, _missing(part))


def peers_only(rows: Iterable[Results]) -> list[Results]:
    """The rows that are not ours."""
    return [row for row in rows if not row["ours"]]


def fastest_of_bits(rows: Sequence[Results]) -> dict[int, Results]:
    """The fastest peer at each number of bits."""
    peers = peers_only(rows)
    found = {bits: fastest(row for row in peers if row["bits"] == bits) for bits in _unique(row["bits"] for row in peers)}
    return {bits: row for bits, row in found.items() if row is not None}


def _missing(part: Results) -> list[str]:
    return _reasons((gone["contender"], gone["reason"]) for gone in part["missing"])


def _reasons(gone: Iterable[tuple[str, str]]) -> list[str]:
    """One sentence for each reason, with all whom it keeps away."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in gone:
        by_reason.setdefault(reason, []).append(name)
    return [f"Not measured: {', '.join(names)} ({reason})." for reason, names in by_reason.items()]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _microseconds(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{1e6 * seconds:.1f}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


def _ratio(value: float | None) -> str:
    return _digits(value, 2)


def _digits(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
