"""The results of all models as JSON, as tables, and as one picture."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from quality import measures, standing

Results = Mapping[str, Any]
NUMBERS = re.compile(r"\[[-+.\deE,\s]*\]")


def write(results: Results, folder: Path) -> list[Path]:
    """Write the files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, table, against = folder / "quality.json", folder / "quality.md", folder / "standing.md"
    data.write_text(as_json(results) + "\n", encoding="utf-8")
    table.write_text("\n".join(lines(results)) + "\n", encoding="utf-8")
    against.write_text("\n".join(standing.lines(results)), encoding="utf-8")
    return [data, table, against, picture(results, folder / "quality.png")]


def as_json(results: Results) -> str:
    """``results`` with each list of numbers on one line."""
    return NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(results, indent=1))


def merged(folder: Path, results: Results) -> Results:
    """``results`` with the rows of the file in ``folder`` that they lack; these alone where the file is of another protocol."""
    path = folder / "quality.json"
    earlier: Results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if earlier.get("protocol") != results["protocol"]:
        return results
    models = dict(earlier["models"])
    for model, measured in results["models"].items():
        rows = {(row["family"], row["name"]): row for part in (models.get(model, measured), measured) for row in part["rows"]}
        models[model] = {**measured, "rows": list(rows.values())}
    return {**results, "models": models}


def line(model: str, row: Results, exact: Results) -> str:
    """A row for the terminal."""
    if "missing" in row:
        return f"{model} {row['family']} {row['name']}: {row['missing']}"
    over = 100 * measures.relative(row, exact)
    return f"{model} {row['family']} {row['name']}: {row['bits']:.2f} bits, perplexity {over:+.2f} %, KL {row['kl']:.4f}"


def lines(results: Results) -> Iterator[str]:
    """The table in markdown."""
    protocol = results["protocol"]
    yield (
        f"{protocol['text']}: {protocol['windows']} windows of {protocol['window']} tokens, stride {protocol['stride']}; "
        f"calibration: {protocol['calibration_tokens']} tokens of {protocol['calibration']};"
        " 95 % intervals by resampling windows.\n"
    )
    yield "| model | method | | bits per weight | perplexity | over float | KL | 95 % | top-1 |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: |"
    for model, measured in results["models"].items():
        exact, *_ = measured["rows"]
        for row in measured["rows"]:
            if "missing" in row:
                yield f"| {model} | {row['family']} | {row['name']} | {row['missing']} | | | | | |"
                continue
            over, (low, high) = 100 * measures.relative(row, exact), row["interval"]["kl"]
            yield (
                f"| {model} | {row['family']} | {row['name']} | {row['bits']:.3f} | {row['perplexity']:.3f} | {over:+.2f} % | "
                f"{row['kl']:.5f} | {low:.5f}–{high:.5f} | {row['top1']:.4f} |"
            )


def picture(results: Results, path: Path) -> Path:
    """KL against bits, a panel for each model and a line for each family."""
    models = results["models"]
    figure, panels = pyplot.subplots(1, len(models), figsize=(6.5 * len(models), 5), layout="constrained", squeeze=False)
    for axes, (model, measured) in zip(panels[0], models.items(), strict=True):
        rows = [row for row in measured["rows"][1:] if "missing" not in row]
        for family in dict.fromkeys(row["family"] for row in rows):
            own = sorted((row["bits"], row["kl"]) for row in rows if row["family"] == family)
            ours = family.startswith("kbit")
            axes.plot(*zip(*own, strict=True), "o-" if ours else "x--", label=family, markersize=4, linewidth=1.6 if ours else 1)
        axes.set(title=f"{model}, {measured['parameters'] / 1e6:.1f} M parameters", xlabel="total bits per weight", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("KL divergence from float32")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
