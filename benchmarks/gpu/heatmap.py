"""A picture of the layers: share of the roofline by bits and rows of x, with the speed-up over cuBLAS written into each cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

Results = dict[str, Any]


def draw(results: Results, path: Path) -> Path | None:
    """The picture of the part ``layers``, or None where it has no row of ours."""
    rows = [row for row in results.get("layers", {}).get("rows", []) if row["contender"].startswith("kbit")]
    if not rows:
        return None
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    figure, axes = plt.subplots(len(shapes), 1, figsize=(11, 2.9 * len(shapes)), squeeze=False, layout="constrained")
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        image = _panel(axis, [row for row in rows if (row["n"], row["k"]) == shape], _cublas(results, shape))
        axis.set_title(f"{shape[0]} × {shape[1]}")
    figure.colorbar(image, ax=axes, label="share of the roofline")
    told = "REHEARSAL: NOTHING WAS MEASURED" if results["rehearsal"] else results["machine"]["device"]
    figure.suptitle(f"{told}; in each cell: times faster than cuBLAS in float16")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _cublas(results: Results, shape: tuple[int, int]) -> dict[int, float]:
    rows = results["layers"]["rows"]
    return {row["m"]: row["seconds"] for row in rows if row["contender"] == "cuBLAS float16" and (row["n"], row["k"]) == shape}


def _panel(axis: Any, rows: list[Results], cublas: dict[int, float]) -> Any:
    bits = sorted({row["bits"] for row in rows})
    inputs = sorted({row["m"] for row in rows})
    shares = [[float("nan")] * len(inputs) for _ in bits]
    for row in rows:
        y, x = bits.index(row["bits"]), inputs.index(row["m"])
        shares[y][x] = row["roofline_share"]
        if row["m"] in cublas:
            axis.text(x, y, f"{cublas[row['m']] / row['seconds']:.1f}", ha="center", va="center", fontsize=8, color="white")
    image = axis.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(inputs)), [str(m) for m in inputs])
    axis.set_yticks(range(len(bits)), [str(b) for b in bits])
    axis.set_xlabel("rows of x")
    axis.set_ylabel("bits")
    return image
