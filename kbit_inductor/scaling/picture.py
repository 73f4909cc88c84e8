"""Perplexity against total bits, a curve for each number of bits, a panel for each format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kbit_inductor.packages import need
from kbit_inductor.scaling.fit import FARTHEST, NAMES, Law, predicted
from kbit_inductor.scaling.sweep import Row

WIDTH, HEIGHT = 6.2, 4.8  # inches of a panel


def draw(rows: Sequence[Row], laws: Sequence[Law]) -> Any:
    """A figure of matplotlib: measured points, fitted curves, dashed beyond the largest model, and the best bits along the top."""
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * len(laws), HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, law in zip(np.atleast_1d(figure.subplots(1, len(laws), sharey=True)), laws, strict=True):
        _panel(axes, [row for row in rows if row.format == law.format], law)
        floats = sorted((row.total_bits / 1e6, np.exp(np.mean(row.loss))) for row in rows if row.bits is None)
        axes.plot(*zip(*floats, strict=True), "k^:", markersize=5, linewidth=0.8, label="float16")
        axes.set_title(law.format, pad=16)  # above the best bits
        axes.set(xlabel="total Mbit, scales included; curves: the law, dashed beyond the largest", xscale="log", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("perplexity")
    return figure


def _panel(axes: Any, rows: Sequence[Row], law: Law) -> None:
    from matplotlib import colormaps

    values = np.array([law.values[name] for name in NAMES])
    for at, (bits, rate) in enumerate(law.bits_per_parameter.items()):
        color = colormaps["viridis"](at / max(len(law.bits_per_parameter) - 1, 1) * 0.9)
        points = [(row.total_bits / 1e6, np.exp(np.mean(row.loss))) for row in rows if row.bits == bits]
        axes.plot(*zip(*points, strict=True), "o", color=color, markersize=4, label=f"{bits} bits")
        for low, high, style in ((law.smallest, law.largest, "-"), (law.largest, FARTHEST * law.largest, "--")):
            sizes = np.geomspace(low, high, 40)
            axes.plot(sizes * rate / 1e6, np.exp(predicted(values, sizes / law.largest, bits)), style, color=color, linewidth=1)
    for choice in law.choices:
        shade = "#777777" if choice.extrapolated else "black"
        place = (choice.total_bits / 1e6, 1)
        axes.annotate(str(choice.bits), place, xycoords=("data", "axes fraction"), color=shade, fontsize=8, ha="center")
    axes.annotate("best bits:", (0, 1), (-4, 0), xycoords="axes fraction", textcoords="offset points", ha="right", fontsize=8)
