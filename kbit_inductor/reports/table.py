"""The answer of ``explain`` as a table for a terminal: a line for layers that are alike, and below it once what is said of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from kbit_inductor import alike
from kbit_inductor.quantizers import CODEBOOK_NAMES
from kbit_inductor.reports.findings import Findings, LayerReport

NAMED = 3  # rows that a note names; of more it tells how many layers they are
TITLES = ("layer", "shape", "bits", "group", "kernel", "expected", "bytes", "packed", "max error")
SHARED = ("group", "kernel")  # told in one line where all packed layers have the same


def table(found: Findings) -> Group:
    """The layers, and notes on them."""
    rows = alike.rows(found.layers, lambda layer: layer.name, lambda layer: (layer.uses, layer.reasons, *_kind(layer).values()))
    lines = [{"layer": line} | ({} if row is None else _kind(row.items[0]) | _sizes(row.items)) for line, row in alike.lines(rows)]
    total = {"layer": "all", "expected": f"{1e6 * found.seconds:.4g} µs"} | _sizes(found.layers) | {"max error": ""}
    shared = _shared(found)
    drawn = Table(show_footer=True, box=box.SIMPLE, padding=(0, 1, 0, 0))
    titles = [title for title in TITLES if title not in shared and any(line.get(title) for line in lines)]
    for title in titles:
        number = title in ("bits", "bytes", "packed", "max error")
        drawn.add_column(title, total.get(title, ""), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for line in lines:
        drawn.add_row(*(line.get(title, "") for title in titles))
    title = f"kbit: {len(found.matched)} of {len(found.layers)} weight matrices packed"
    return Group(title, drawn, *_notes(found, shared))


def _kind(layer: LayerReport) -> dict[str, str]:
    """The cells that layers of one row share."""
    bits = group = ""
    if layer.config is not None:
        name = layer.config.codebook if layer.config.codebook in CODEBOOK_NAMES else "own levels"
        bits = f"{layer.config.bits} {name}" if layer.config.levels() else str(layer.config.bits)
        group = "row" if layer.config.group_size == -1 else str(layer.config.group_size)
    return {
        "shape": " x ".join(map(str, layer.shape)),
        "bits": bits,
        "group": group,
        "kernel": ", ".join(dict.fromkeys(layer.kernels)),
        "expected": ", ".join(dict.fromkeys(f"{1e6 * each.seconds:.3g} µs" for each in layer.expected)),
    }


def _sizes(layers: Sequence[LayerReport]) -> dict[str, str]:
    """Of all ``layers`` together; the error of the worst."""
    before, after = (sum(getattr(layer, key) for layer in layers) for key in ("bytes_before", "bytes_after"))
    errors = [layer.error for layer in layers if layer.matched]
    return {"bytes": f"{before:,}", "packed": f"{after:,}", "max error": f"{max(errors):.2g}" if errors else ""}


def _shared(found: Findings) -> dict[str, str]:
    cells = [_kind(layer) for layer in found.matched]
    return {title: cells[0][title] for title in SHARED if len({each[title] for each in cells}) == 1}


def _notes(found: Findings, shared: Mapping[str, str]) -> Iterator[str]:
    if shared:
        yield "all that are packed: " + ", ".join(f"{title} {value}" for title, value in shared.items())
    breaks = "; ".join(f"{reason.splitlines()[0]} ({count})" for reason, count in found.graph_breaks.items()) or "none"
    fused = ", ".join(f"{kind} {count}" for kind, count in sorted(found.fusions.items())) or "nothing"
    yield f"graphs: {found.graphs}, graph breaks: {breaks}; fused: {fused}"
    layers = found.layers
    yield from _lines("use", layers, lambda layer: layer.uses)
    yield from _lines("why", layers, lambda layer: layer.reasons)
    yield from _lines("other kernels", layers, lambda layer: [f"{kernel} {reason}" for kernel, reason in layer.rejected.items()])
    yield from _lines(
        "expected on",
        layers,
        lambda layer: [f"{each.device} by {each.kernel}: {each.bound} (M {each.m})" for each in layer.expected],
    )
    yield from _lines(
        "fastest by rows of x (M)",
        layers,
        lambda layer: [str(each.ranges) for each in layer.expected if len(each.ranges.names) > 1],
    )


def _lines(title: str, layers: Sequence[LayerReport], notes: Callable[[LayerReport], Iterable[str]]) -> Iterator[str]:
    """What is said of each layer, once, with the names of those that it is said of."""
    said: dict[str, list[str]] = {}
    for layer in layers:
        for note in dict.fromkeys(notes(layer)):
            said.setdefault(note, []).append(layer.name)
    if said:
        yield f"{title}:"
    for note, names in said.items():
        named = alike.names(names)
        yield f"  {note} ({', '.join(named) if len(named) <= NAMED else f'{len(names)} layers'})"
