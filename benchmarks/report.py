"""The demo's results as a table, as JSON, as a picture, and as a block of docs/demo.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from page import replace
from rich import box
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

Results = dict[str, Any]
MARK = "results"
COLUMNS = ("", "weights", "per weight", "peak", "decoding", "perplexity", "decode", "first call")
UNITS = ("", "MB", "bits", "MB", "MB", "", "tok/s", "s")
BLUE, RED, GREY = "#2a5db0", "#c2452d", "#777777"


def name(variant: str) -> str:
    """The variant as the table shows it."""
    return {"eager": "float32 eager", "inductor": "float32 Inductor"}.get(variant, f"kbit {variant} bits")


def cells(row: Results) -> list[str]:
    """The figures of one row, in the order of :data:`COLUMNS`."""
    return [
        name(row["variant"]),
        f"{row['weight_bytes'] / 1e6:.1f}",
        f"{8 * row['weight_bytes'] / row['parameters']:.2f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['decode_bytes'] / 1e6:.0f}",
        _rounded(row["perplexity"]),
        f"{row['tokens_per_second']:.1f}",
        f"{row['first_call']:.1f}",
    ]


def _rounded(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def table(results: Results) -> Table:
    """The rows as a rich table."""
    title = f"{results['model']}, {results['machine']['cpu']}, {results['machine']['threads']} threads"
    drawn = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for title, unit in zip(COLUMNS, UNITS, strict=True):
        header = f"{title}\n{unit}".replace(" ", "\n").strip()
        drawn.add_column(header, justify="right" if title else "left", no_wrap=True)
    for row in results["rows"]:
        drawn.add_row(*cells(row))
    return drawn


def notes(results: Results) -> list[str]:
    """What is measured, and what it does not show."""
    protocol = results["protocol"]
    window, windows = protocol["window"], protocol["text_tokens"] // protocol["window"]
    start = results["rows"][0]["start_bytes"] / 1e6
    way = {
        "whole": "The model is compiled as one graph.",
        "by layers": "Embedding, layers and head are compiled each by itself; all layers share one graph.",
    }
    return [
        "Weights: packed operands, scales included, and whatever stays in float; the tied head and embedding count once.",
        "Peak and decoding: resident memory of a process of its own for each row, from the loaded model on. Python, torch, the "
        f"compiler and the float weights before packing are in the peak ({start:.0f} MB at the start). While decoding, the kbit "
        "rows have freed their float weights (release_weights=True).",
        f"Perplexity: the first {protocol['text_tokens']} tokens of the WikiText-2 test text in {windows} windows of {window} that "
        f"do not overlap; each predicts its last {window - 1} tokens, without a start token. So short a text has an error of "
        "several percent; the rows share it, so they compare.",
        f"Decode: greedy, batch 1, static KV cache, median of {protocol['new_tokens']} steps.",
        f"First call: compiling for one window, packing included. {way[protocol['compiled']]} Rows share an Inductor cache that "
        "was empty at the start, so a later row may find C++ there that an earlier one compiled. The kernels' own C++ library was "
        f"built before, once per machine: {results['seconds']['kernels']:.1f} s (0 when cached).",
        "SmolLM2's GGUF file is already rounded to 4 bits (Q4_1, groups of 32), so the float32 rows are a 4-bit model. The "
        "kbit rows round it once more, on grids of their own: they say little about how a model that was not rounded before fares.",
    ]


def write_json(results: Results, folder: Path) -> Path:
    """Write ``results.json``."""
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_picture(results: Results, folder: Path) -> Path:
    """Draw bits against perplexity and against bytes, with the float model for comparison."""
    rows = sorted((row for row in results["rows"] if row["variant"].isdigit()), key=lambda row: int(row["variant"]))
    floats = [row for row in results["rows"] if not row["variant"].isdigit()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    bits = [int(row["variant"]) for row in rows]
    _curve(left, bits, [row["perplexity"] for row in rows])
    _bars(right, bits, [row["weight_bytes"] / 1e6 for row in rows])
    if floats:
        _level(left, floats[0]["perplexity"], f"float32: {floats[0]['perplexity']:.1f}")
        _level(right, floats[0]["weight_bytes"] / 1e6, f"float32: {floats[0]['weight_bytes'] / 1e6:.0f} MB")
    left.set(title="Perplexity (lower is better)", xlabel="bits", yscale="log")
    right.set(title="Weights in MB, scales included", xlabel="bits", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(bits)
        axes.spines[["top", "right"]].set_visible(False)
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    figure.suptitle(f"{results['model']}, weights of k bits")
    path = folder / "bits.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _curve(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    axes.plot(x, y, "o-", color=BLUE)
    for at, value in zip(x, y, strict=True):
        axes.annotate(_rounded(value), (at, value), (4, 6), textcoords="offset points", color=BLUE)
    axes.margins(0.12, 0.15)


def _bars(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    axes.bar_label(axes.bar(x, y, color=RED), fmt="{:.0f}", color=RED)


def _level(axes: Axes, value: float, text: str) -> None:
    axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        text, (1, value), (0, -13), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=GREY
    )


def markdown(results: Results) -> str:
    """The table and its notes for a document."""
    head = [f"{title}, {unit}" if unit else title for title, unit in zip(COLUMNS, UNITS, strict=True)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *(cells(row) for row in results["rows"])]
    machine = results["machine"]
    caption = f"{results['model']} on {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}:"
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([caption, "", *rows, "", *(f"* {note}" for note in notes(results))])


def write(results: Results, document: Path) -> None:
    """Replace what stands between the two markers in ``document``."""
    replace(document, MARK, [markdown(results)])
