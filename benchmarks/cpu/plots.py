"""Two pictures of the results: time of a layer against bits, and the parts of one decoded token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from cpu.ceilings import bandwidth
from cpu.tables import fastest_of_bits

Results = dict[str, Any]
COLOURS = {"kbit": "#2a5db0", "kbit operator": "#7fa3db"}
PEERS, READING = "#c2452d", "#777777"


def layers(results: Results, path: Path) -> Path:
    """Time against bits on the first layer, one panel for each number of rows of x."""
    rows = results["layers"]["rows"]
    first = (rows[0]["rows"], rows[0]["columns"])
    rows = [row for row in rows if (row["rows"], row["columns"]) == first]
    inputs = list(dict.fromkeys(row["inputs"] for row in rows))
    figure, panels = pyplot.subplots(1, len(inputs), figsize=(3.4 * len(inputs), 3.8), layout="constrained", squeeze=False)
    for axes, count in zip(panels[0], inputs, strict=True):
        _panel(axes, [row for row in rows if row["inputs"] == count], bandwidth(results.get("ceilings", {"read_bandwidth": {}})))
        axes.set(title=f"M = {count}", xlabel="bits", ylim=(0, None))
    panels[0][0].set_ylabel("µs")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"y = x Wᵀ, W {first[0]}×{first[1]}, {results['machine']['threads']} threads")
    return _save(figure, path)


def _panel(axes: Axes, rows: Sequence[Results], reading: float | None) -> None:
    for family, colour in COLOURS.items():
        own = sorted((row for row in rows if row["family"] == family), key=lambda row: row["bits"])
        axes.plot([row["bits"] for row in own], [_us(row) for row in own], "o-", color=colour, label=family, markersize=4)
    if reading and own and own[0]["cold"]:
        axes.plot([row["bits"] for row in own], [1e6 * row["bytes"] / reading for row in own], "--", color=READING, label="reading")
    peers = {bits: row for bits, row in fastest_of_bits(rows).items() if bits <= 8}
    axes.plot(list(peers), [_us(row) for row in peers.values()], "x", color=PEERS, label="fastest peer")
    for bits, row in peers.items():
        axes.annotate(row["contender"], (bits, _us(row)), (3, 3), textcoords="offset points", fontsize=6, color=PEERS)
    axes.set_xticks(range(1, 9))
    axes.spines[["top", "right"]].set_visible(False)


def _us(row: Results) -> float:
    return 1e6 * float(row["seconds"]["median"])


def decode(results: Results, path: Path) -> Path:
    """A bar for each number of bits, stacked of the parts of a step."""
    rows = results["breakdown"]["rows"]
    names = [row["contender"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.6 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for part in rows[0]["parts"]:
        widths = [1e6 * row["parts"][part] for row in rows]
        axes.barh(names, widths, left=left, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(xlabel="µs", title="One decoded token")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
