"""A whole study of scaling: the sweep, the laws, and what is written of them."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor

from kbit_inductor.config import LayerConfig
from kbit_inductor.scaling import picture
from kbit_inductor.scaling.fit import NAMES, Law, fit
from kbit_inductor.scaling.sweep import Models, Row, sweep

JSON, CSV, PICTURES = "scaling.json", "scaling.csv", ("scaling.png", "scaling.svg")


@dataclass(frozen=True)
class Study:
    """What was measured, and the law of each format."""

    rows: tuple[Row, ...]
    laws: tuple[Law, ...]

    def write(self, folder: Path) -> list[Path]:
        """Write JSON, a table of all rows as CSV, and the picture as PNG and SVG; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {"rows": [_summary(row) for row in self.rows], "laws": [dataclasses.asdict(law) for law in self.laws]}
        (folder / JSON).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        with (folder / CSV).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(_summary(self.rows[0])))
            writer.writeheader()
            writer.writerows(map(_summary, self.rows))
        figure = picture.draw(self.rows, self.laws)
        for name in PICTURES:
            figure.savefig(folder / name, dpi=130)
        return [folder / name for name in (JSON, CSV, *PICTURES)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The parameters of each law, and the best bits by total size."""
        for law in self.laws:
            yield f"[bold]{law.format}[/bold]: misfit {law.misfit:.3f} nats"
            table = Table(*NAMES)
            table.add_row(*(f"{law.values[name]:.3g} ({low:.3g} … {high:.3g})" for name, (low, high) in law.intervals.items()))
            yield table
            best = Table("total Mbit", "best bits", "perplexity", "of resampled fits")
            for choice in law.choices:
                mark = " (extrapolated)" if choice.extrapolated else ""
                best.add_row(
                    f"{choice.total_bits / 1e6:.3g}", str(choice.bits), f"{math.exp(choice.loss):.4g}{mark}", f"{choice.share:.0%}"
                )
            yield best


def _summary(row: Row) -> dict[str, Any]:
    loss, divergence = (sum(values) / len(values) for values in (row.loss, row.divergence))
    return {
        "model": row.model, "parameters": row.parameters, "bits": row.bits, "format": row.format, "total_bits": row.total_bits,
        "bits_per_parameter": row.total_bits / row.parameters, "loss": loss, "perplexity": math.exp(loss), "kl": divergence,
        "top1": row.agreement,
    }  # fmt: skip


def formats(
    bits: Iterable[int], group_sizes: Iterable[int], codebooks: Iterable[str], quantizers: Iterable[str]
) -> list[LayerConfig]:
    """All of them together; a codebook that says nothing new at some bits is left out there."""
    configs = [
        LayerConfig(b, group_size, quantizer=quantizer, codebook=codebook)
        for group_size, codebook, quantizer, b in itertools.product(group_sizes, codebooks, quantizers, bits)
    ]
    return [config for config in configs if config.codebook == "uniform" or config.levels() is not None]


def scaling(
    models: Models,
    windows: Tensor,
    folder: str | Path,
    *,
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    group_sizes: Sequence[int] = (64,),
    codebooks: Sequence[str] = ("uniform",),
    quantizers: Sequence[str] = ("clip",),
) -> Study:
    """Measure a family of models at different bits, and fit a law of size and bits (:mod:`kbit_inductor.scaling.fit`).

    Each point is noted in ``folder`` as soon as it is measured. When it was interrupted, the same call goes on from there.

    Args:
        models: functions that load causal language models of transformers, by name; three sizes at least. They share a tokenizer.
        windows: of the text to predict, int64 ``[windows, length]``.
        folder: where points are noted. ``Study.write`` writes the results, there or elsewhere.
        bits: three different ones at least.
        group_sizes: columns that share a scale; -1 for a whole row.
        codebooks: values of the option ``codebook``.
        quantizers: values of the option ``quantizer``.

    Raises:
        InvalidOptionError: too few models or bits, a value that an option does not take, or a folder with results of another text.
        CorruptModelError: a damaged file in ``folder``.
    """
    rows = sweep(models, windows, formats(bits, group_sizes, codebooks, quantizers), Path(folder))
    return Study(tuple(rows), tuple(fit(rows)))
