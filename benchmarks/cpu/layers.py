"""Single layers, ``y = x Wᵀ``: every contender in one process, by turns.

Up to 16 rows of x, the weights come from memory, as they do in a model: each call takes the next of enough copies to fill the
caches several times. With more rows the same copy is used again, since then time goes into arithmetic. Small layers stay in the
cache, as those of a small model do.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpu.contender import Contender, Copy, relative_error
from cpu.timing import Budget, Say, interleave, silent, summary

COLD_BYTES = 96e6  # three times the largest cache this was written for
HOT_ROWS = 128


@dataclass(frozen=True)
class Layer:
    """A layer to measure: W is ``rows`` × ``columns``, x has each number of ``inputs`` rows in turn."""

    rows: int
    columns: int
    inputs: tuple[int, ...]
    cached: bool = False


LAYERS = (
    *(Layer(rows, columns, (1, 4, 16, 128, 512)) for rows, columns in ((4096, 4096), (11008, 4096), (4096, 11008))),
    *(Layer(rows, columns, (1,), cached=True) for rows, columns in ((576, 576), (1536, 576), (576, 1536))),
)
QUICK = (Layer(256, 512, (1, 4), cached=True),)


@dataclass(frozen=True)
class Prepared:
    """A contender with its copies of a layer's weight, and its relative error on one row of x."""

    contender: Contender
    copies: list[Copy]
    error: float


def measure(layers: Iterable[Layer], contenders: Sequence[Contender], budget: Budget, say: Say = silent) -> dict[str, Any]:
    """``rows``: one for each layer, number of inputs and contender. ``missing``: those who cannot, with the reason."""
    rows: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for layer in layers:
        prepared, reasons = prepare(layer, contenders, say)
        missing += [{**_shape(layer), "contender": name, "reason": reason} for name, reason in reasons.items()]
        for inputs in layer.inputs:
            say(f"{layer.rows}×{layer.columns}, {inputs} rows of x")
            rows += _measure_row(layer, inputs, prepared, budget)
        del prepared
        gc.collect()
    return {"rows": rows, "missing": missing}


def prepare(layer: Layer, contenders: Sequence[Contender], say: Say = silent) -> tuple[list[Prepared], dict[str, str]]:
    """The contenders that can compute the layer, and by name, why the others cannot."""
    torch.manual_seed(0)
    weight = torch.randn(layer.rows, layer.columns) / math.sqrt(layer.columns)
    x = torch.randn(1, layer.columns)
    prepared, reasons = [], {}
    for contender in contenders:
        say(f"{layer.rows}×{layer.columns}, packing: {contender.name}")
        try:
            copies = copies_of(contender, weight, 0 if layer.cached else COLD_BYTES)
            prepared.append(Prepared(contender, copies, relative_error(copies[0], weight, x)))
        except Exception as error:  # whatever a library raises is the reason why it has no row
            reasons[contender.name] = str(error) or type(error).__name__
    return prepared, reasons


def copies_of(contender: Contender, weight: Tensor, least_bytes: float) -> list[Copy]:
    """As many copies of ``weight`` as have ``least_bytes`` together, one at least."""
    make = contender.load(weight)
    copies = [make()]
    while len(copies) * copies[0].nbytes < least_bytes:
        copies.append(make())
    return copies


def _measure_row(layer: Layer, inputs: int, prepared: Sequence[Prepared], budget: Budget) -> list[dict[str, Any]]:
    """The contenders on ``inputs`` rows of x."""
    x = torch.randn(inputs, layer.columns)
    hot = layer.cached or inputs >= HOT_ROWS
    calls = {one.contender.name: [copy.bind(x) for copy in one.copies[: 1 if hot else None]] for one in prepared}
    seconds = interleave(calls, budget)
    return [
        {
            **_shape(layer),
            "inputs": inputs,
            "cold": not hot,
            "contender": one.contender.name,
            "family": one.contender.family,
            "bits": one.contender.bits,
            "ours": one.contender.ours,
            "bytes": one.copies[0].nbytes,
            "error": one.error,
            "seconds": summary(seconds[one.contender.name]),
        }
        for one in prepared
    ]


def _shape(layer: Layer) -> dict[str, int]:
    return {"rows": layer.rows, "columns": layer.columns}


def compare(rows: Sequence[dict[str, Any]], bandwidth: float | None) -> list[dict[str, Any]]:
    """Our rows with their ratios: a value of 2 is twice the time.

    ``of_reading``: to reading the bytes at the measured ``bandwidth``, where they come from memory. ``of_best``: to the fastest
    peer on the same layer and x. ``of_same_bits``: to the fastest of its peers with as many bits.
    """
    return [row | _ratios(row, rows, bandwidth) for row in rows if row["ours"]]


def _ratios(row: dict[str, Any], rows: Sequence[dict[str, Any]], bandwidth: float | None) -> dict[str, Any]:
    own = row["seconds"]["median"]
    peers = [peer for peer in rows if not peer["ours"] and all(peer[key] == row[key] for key in ("rows", "columns", "inputs"))]
    best = fastest(peers)
    same = fastest(peer for peer in peers if peer["bits"] == row["bits"])
    return {
        "of_reading": own / (row["bytes"] / bandwidth) if bandwidth and row["cold"] else None,
        "of_best": own / best["seconds"]["median"] if best else None,
        "best": best and best["contender"],
        "of_same_bits": own / same["seconds"]["median"] if same else None,
    }


def fastest(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with the least median."""
    return min(rows, key=lambda row: float(row["seconds"]["median"]), default=None)
