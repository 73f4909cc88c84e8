"""How our rows stand against other libraries': against each of theirs, the best of ours that takes no more bits.

Both are measured on the same windows, so windows are resampled for both together: how hard a window is drops out of the ratio, and
the interval tells of the two methods alone.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Results = Mapping[str, Any]

RESULTS = Path(__file__).resolve().parent.parent / "results" / "quality.json"
MEASURES = {"kl": "KL", "perplexity": "perplexity"}
RESAMPLES = 1000
SAME_BITS = 0.005  # less than a hundredth when told: a codebook of four levels for each matrix, for one
LEAST_BITS, MOST_BITS = 2.25, 8.25  # of what is compared


@dataclass(frozen=True)
class Standing:
    """One row of another library, the best of ours at no more bits, and theirs to ours.

    Attributes:
        theirs: of another library.
        ours: the best by the measure; None where all of ours take more bits.
        ratio: of the measure, ours over theirs; below 1 ours is better.
        low: of the 95 % interval of the ratio.
        high: of the same.
    """

    theirs: Row
    ours: Row | None
    ratio: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")

    @property
    def verdict(self) -> str:
        """``"better"`` or ``"worse"``, of ours, by where the interval is, else ``"tie"``; ``"none"`` without a row of ours."""
        if self.ours is None:
            return "none"
        return "better" if self.high < 1 else "worse" if self.low > 1 else "tie"


def standings(rows: Sequence[Row], measure: str) -> list[Standing]:
    """Of each row of another library among the ``rows`` of one model, by rising bits. ``measure`` is one of :data:`MEASURES`."""
    measured = [row for row in rows if "windows" in row]
    ours = [row for row in measured if row["family"].startswith("kbit")]
    theirs = [row for row in measured if row not in ours and LEAST_BITS <= row["bits"] <= MOST_BITS]
    return [_standing(row, ours, measure) for row in sorted(theirs, key=lambda row: float(row["bits"]))]


def _standing(theirs: Row, ours: Sequence[Row], measure: str) -> Standing:
    fit = [row for row in ours if row["bits"] <= theirs["bits"] + SAME_BITS]
    if not fit:
        return Standing(theirs, None)
    best = min(fit, key=lambda row: float(row[measure]))
    return Standing(theirs, best, best[measure] / theirs[measure], *interval(best, theirs, measure))


def interval(ours: Row, theirs: Row, measure: str) -> tuple[float, float]:
    """The 95 % interval of the ratio of the two, from resampled windows."""
    mine, other = (np.array(row["windows"][measure]) for row in (ours, theirs))
    picked = np.random.default_rng(0).integers(0, len(mine), (RESAMPLES, len(mine)))
    mine, other = mine[picked].mean(1), other[picked].mean(1)
    # Of a window's perplexity its logarithm is kept.
    low, high = np.percentile(np.exp(mine - other) if measure == "perplexity" else mine / other, [2.5, 97.5])
    return float(low), float(high)


def lines(results: Results) -> Iterator[str]:
    """A table in markdown for each measure, and a sentence that sums it up."""
    yield (
        "Ours at no more total bits, the best by the measure, over each row of another library; below 1 ours is better. 95 % "
        "intervals by resampling windows for both together; an interval that holds 1 is a tie.\n"
    )
    for measure, name in MEASURES.items():
        found = {model: standings(measured["rows"], measure) for model, measured in results["models"].items()}
        counts = Counter(each.verdict for model in found.values() for each in model)
        summary = ", ".join(f"{verdict} in {count}" for verdict, count in sorted(counts.items()))
        yield f"**{name}**: {summary} of {counts.total()} rows.\n"
        yield "| model | theirs | bits | ours | bits | ratio | 95 % | ours is |"
        yield "| --- | --- | ---: | --- | ---: | ---: | --- | --- |"
        for model, each in ((model, each) for model, many in found.items() for each in many):
            yield f"| {model} | {_name(each.theirs)} | {each.theirs['bits']:.3f} | {_ours(each)} | {each.verdict} |"
        yield ""


def _name(row: Row) -> str:
    return f"{row['family']} {row['name']}".strip()


def _ours(standing: Standing) -> str:
    if standing.ours is None:
        return "| | |"
    ratio = f"{standing.ratio:.3f} | {standing.low:.3f}–{standing.high:.3f}"
    return f"{_name(standing.ours)} | {standing.ours['bits']:.3f} | {ratio}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of a file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="what run.py has written")
    path = parser.parse_args(arguments).results
    print("\n".join(lines(json.loads(path.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()
