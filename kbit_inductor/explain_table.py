"""The answer of ``explain`` as a table for a terminal: a line for each layer, and below it once what is said of many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from kbit_inductor.quantizers import CODEBOOK_NAMES

if TYPE_CHECKING:
    from kbit_inductor.explain import Explanation, LayerReport

NAMED = 3  # layers that a note names; of more it tells how many


def table(found: Explanation) -> Group:
    """The layers, and notes on them."""
    rows = Table(title=f"kbit: {len(found.matched)} of {len(found.layers)} weight matrices packed", show_footer=True)
    before, after = (sum(getattr(layer, key) for layer in found.layers) for key in ("bytes_before", "bytes_after"))
    times = [each for layer in found.layers for each in layer.expected]
    columns = [("layer", ""), ("shape", ""), ("use", ""), ("bits", ""), ("group", ""), ("bytes before", f"{before:,}"),
               ("after", f"{after:,}"), ("error", ""), ("kernel", "")]  # fmt: skip
    if any(layer.reasons for layer in found.layers):
        columns.append(("why", ""))
    if times:
        columns.append((f"expected on {times[0].device}", f"{1e6 * found.seconds:.4g} µs"))
    for title, footer in columns:
        right = title in ("bits", "group", "bytes before", "after", "error")
        rows.add_column(title, footer, justify="right" if right else "left", overflow="fold")
    for layer in found.layers:
        why = ["; ".join(layer.reasons)] if any(each.reasons for each in found.layers) else []
        expected = ["; ".join(dict.fromkeys(map(str, layer.expected)))] if times else []
        rows.add_row(*_cells(layer), *why, *expected)
    breaks = "; ".join(f"{reason.splitlines()[0]} ({count})" for reason, count in found.graph_breaks.items()) or "none"
    fused = ", ".join(f"{kind} {count}" for kind, count in sorted(found.fusions.items())) or "nothing"
    graphs = f"graphs: {found.graphs}, graph breaks: {breaks}; fused: {fused}"
    return Group(rows, graphs, *_lines("other kernels", _rejected(found)), *_lines("fastest by rows of x (M)", _ranges(found)))


def _rejected(found: Explanation) -> Mapping[str, list[str]]:
    """Why kernels were not chosen, and of which layers."""
    notes: dict[str, list[str]] = {}
    for layer in found.layers:
        for kernel, reason in layer.rejected.items():
            notes.setdefault(f"{kernel} {reason}", []).append(layer.name)
    return notes


def _ranges(found: Explanation) -> Mapping[str, list[str]]:
    """Where the fastest kernel depends on the number of rows."""
    notes: dict[str, list[str]] = {}
    for layer in found.layers:
        for each in layer.expected:
            if len(each.ranges.names) > 1:
                notes.setdefault(str(each.ranges), []).append(layer.name)
    return notes


def _lines(title: str, notes: Mapping[str, list[str]]) -> Iterator[str]:
    if notes:
        yield f"{title}:"
    for note, names in notes.items():
        named = list(dict.fromkeys(names))
        yield f"  {note} ({', '.join(named) if len(named) <= NAMED else f'{len(named)} layers'})"


def _cells(layer: LayerReport) -> list[str]:
    shape = " x ".join(map(str, layer.shape))
    if layer.config is None:
        return [layer.name, shape, "", "", "", f"{layer.bytes_before:,}", f"{layer.bytes_after:,}", "", ""]
    name = layer.config.codebook if layer.config.codebook in CODEBOOK_NAMES else "own levels"
    bits = f"{layer.config.bits} {name}" if layer.config.levels() else str(layer.config.bits)
    group = "row" if layer.config.group_size == -1 else str(layer.config.group_size)
    return [
        layer.name, shape, ", ".join(dict.fromkeys(layer.uses)), bits, group, f"{layer.bytes_before:,}",
        f"{layer.bytes_after:,}", f"{layer.error:.2g}", ", ".join(dict.fromkeys(layer.kernels)),
    ]  # fmt: skip
