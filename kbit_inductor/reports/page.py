"""What ``explain`` tells as one HTML page, which needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from torch import fx

from kbit_inductor.capture import Context
from kbit_inductor.passes.record import Pass
from kbit_inductor.reports.findings import Findings, LayerReport

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>kbit: {title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ padding: .2em .6em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }}
td.number {{ text-align: right; white-space: nowrap; }}
.bar {{ background: #cdd6e4; height: .7em; min-width: 1px; }}
.bar > div {{ background: #2f6fd0; height: 100%; }}
pre {{ overflow-x: auto; background: #f5f5f5; padding: .6em; }}
#search {{ width: 30em; padding: .3em; margin: 1em 0; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<input id="search" type="search" placeholder="layer, kernel or reason" aria-label="search">
<table>
<thead><tr><th>layer<th>shape<th>use<th>bits<th>bytes before<th>after<th>of the largest
<th>error<th>kernel<th>expected<th>why</thead>
<tbody id="layers">
{rows}
</tbody>
</table>
<h2>Passes</h2>
{graphs}
<script>
document.getElementById("search").addEventListener("input", event => {{
  const wanted = event.target.value.toLowerCase();
  for (const row of document.getElementById("layers").rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
}});
</script>
</html>
"""


@dataclass(frozen=True)
class Step:
    """A graph as one pass left it.

    Attributes:
        name: of the pass; ``"captured"`` for the graph before the first.
        tier: what the pass promises.
        seconds: that it took.
        text: the graph.
    """

    name: str
    tier: str
    seconds: float
    text: str


class Steps:
    """Keeps every graph before and after each pass. An observer of the pipeline."""

    def __init__(self) -> None:
        self.graphs: list[list[Step]] = []

    def before(self, gm: fx.GraphModule, context: Context) -> None:
        """Begin a graph."""
        self.graphs.append([Step("captured", "", 0.0, str(gm.graph))])

    def after(self, each: Pass, gm: fx.GraphModule, context: Context, seconds: float) -> None:
        """Keep what ``each`` made of it."""
        self.graphs[-1].append(Step(each.name, each.tier, seconds, str(gm.graph)))


def render(explanation: Findings, graphs: Sequence[Sequence[Step]]) -> str:
    """The page: layers with a search over them, and each graph before and after each pass that changed it."""
    layers = explanation.layers
    before, after = (sum(getattr(layer, key) for layer in layers) for key in ("bytes_before", "bytes_after"))
    largest = max((layer.bytes_before for layer in layers), default=0) or 1
    longest = max(map(_seconds, layers), default=0.0) or 1.0
    fused = ", ".join(f"{kind} {count}" for kind, count in sorted(explanation.fusions.items())) or "nothing"
    breaks = sum(explanation.graph_breaks.values())
    return PAGE.format(
        title=f"{len(explanation.matched)} of {len(layers)} weight matrices packed",
        summary=escape(f"{before:,} bytes become {after:,}. Graphs: {explanation.graphs}, graph breaks: {breaks}; fused: {fused}."),
        rows="\n".join(_row(layer, largest, longest) for layer in layers),
        graphs="\n".join(part for number, steps in enumerate(graphs) for part in _passes(number, steps)),
    )


def _seconds(layer: LayerReport) -> float:
    return sum(expected.seconds for expected in layer.expected)


def _row(layer: LayerReport, largest: int, longest: float) -> str:
    why = [*layer.reasons, *(f"not {name}: {reason}" for name, reason in layer.rejected.items())]
    texts = [layer.name, " × ".join(map(str, layer.shape)), ", ".join(dict.fromkeys(layer.uses))]
    numbers = [str(layer.config.bits) if layer.config else "", f"{layer.bytes_before:,}", f"{layer.bytes_after:,}"]
    size = _bar(layer.bytes_before / largest, layer.bytes_after / max(layer.bytes_before, 1))
    error = f"{layer.error:.2g}" if layer.config else ""
    several = [f"{each}; {each.ranges}" if len(each.ranges.names) > 1 else str(each) for each in layer.expected]
    expected = escape("; ".join(dict.fromkeys(several)))
    time = expected and expected + _bar(_seconds(layer) / longest, 1.0)
    ends = [", ".join(dict.fromkeys(layer.kernels)), "; ".join(why)]
    return (
        "<tr>" + _cells(texts) + _cells(numbers, "number") + f"<td>{size}</td>" + _cells([error], "number")
        + _cells(ends[:1]) + f"<td>{time}</td>" + _cells(ends[1:]) + "</tr>"
    )  # fmt: skip


def _bar(length: float, filled: float) -> str:
    """A bar of a part of its column's width, of which a part is filled."""
    return f'<div class="bar" style="width:{100 * length:.1f}%"><div style="width:{100 * filled:.1f}%"></div></div>'


def _cells(texts: Iterable[str], kind: str = "text") -> str:
    return "".join(f'<td class="{kind}">{escape(text)}</td>' for text in texts)


def _passes(number: int, steps: Sequence[Step]) -> Iterable[str]:
    yield f"<h3>Graph {number}</h3>"
    earlier = ""
    for step in steps:
        told = f"{step.name} ({step.tier}, {1e3 * step.seconds:.1f} ms)" if step.tier else step.name
        if step.text == earlier:
            yield f"<p>{escape(told)}: changed nothing</p>"
        else:
            yield f"<details><summary>{escape(told)}</summary><pre>{escape(step.text)}</pre></details>"
        earlier = step.text
