"""What is to be reached on an H200, and what a run found. On another GPU the shares still say how good the kernels are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Results = dict[str, Any]
SIDE = 8192  # of the layer that published figures are of
ROWS_OF_SIDE = (1, 16, 64, 128)
NOISE = 0.02  # what two measurements of one configuration may differ by


def judged(results: Results) -> list[Results]:
    """Each target with the worst figure that was found for it, and whether it is met; None where nothing was measured."""
    return [*_layers(results), *_epilogue(results), *_models(results), *_short_lists(results)]


def _target(name: str, figures: list[float], least: float) -> Results:
    worst = min(figures, default=None)
    return {"target": name, "least": least, "found": worst, "met": None if worst is None else worst >= least}


def _layers(results: Results) -> Iterator[Results]:
    rows = results.get("layers", {}).get("rows", [])
    ours = [row for row in rows if row["contender"].startswith("kbit") and (row["n"], row["k"]) == (SIDE, SIDE)]
    single = [row["roofline_share"] for row in ours if row["m"] == 1 and row["bits"] in (2, 3, 4, 8)]
    for least in (0.6, 0.8):
        yield _target(f"{SIDE}², one row, 2, 3, 4 and 8 bits: share of the roofline", single, least)
    for inputs in ROWS_OF_SIDE:
        yield _target(f"{SIDE}², {inputs} rows: times faster than the fastest peer of as many bits", _over_peers(rows, inputs), 1.0)
    yield _target("all layers, from 256 rows up: times faster than cuBLAS", _over_cublas(rows, 256), 1.0)


def _over_peers(rows: list[Results], inputs: int) -> list[float]:
    at = [row for row in rows if row["m"] == inputs and (row["n"], row["k"]) == (SIDE, SIDE)]
    found = []
    for row in at:
        peers = [other["seconds"] for other in at if other["bits"] == row["bits"] and not other["contender"].startswith("kbit")]
        if row["contender"].startswith("kbit") and peers:
            found.append(min(peers) / row["seconds"])
    return found


def _over_cublas(rows: list[Results], least_inputs: int) -> list[float]:
    cublas = {(row["n"], row["k"], row["m"]): row["seconds"] for row in rows if row["contender"] == "cuBLAS float16"}
    ours = [row for row in rows if row["contender"].startswith("kbit") and row["m"] >= least_inputs]
    pairs = [(cublas.get((row["n"], row["k"], row["m"])), row["seconds"]) for row in ours]
    return [theirs / seconds for theirs, seconds in pairs if theirs is not None]


def _epilogue(results: Results) -> Iterator[Results]:
    costs = [-row["cost"] for row in results.get("epilogue", {}).get("rows", [])]
    yield _target("fused epilogue: its cost, negative", costs, -0.03)


def _models(results: Results) -> Iterator[Results]:
    rows = results.get("models", {}).get("rows", [])
    share = [row["bytes_share"] for row in rows if (row["model"], row["contender"]) == ("Llama 8B", "kbit 4")]
    yield _target("Llama 8B at 4 bits, batch 1: share of the bytes' limit", share, 0.8)


def _short_lists(results: Results) -> Iterator[Results]:
    rows = results.get("configurations", {}).get("rows", [])
    behind = [-row["behind"] for row in rows if row["complete"]]
    yield _target("short list of 8: how far its best is behind the best of all, negative", behind, -NOISE)
