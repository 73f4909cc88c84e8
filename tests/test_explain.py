import io
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.lowering.registry import KERNELS
from kbit_inductor.reports.findings import LayerReport


class Model(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.table = nn.Embedding(60, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.tiny, self.unused = nn.Linear(64, 2), nn.Linear(64, 64)
        self.head = nn.Linear(64, 60, bias=False)
        self.head.weight = self.table.weight
        self.breaks = breaks

    def forward(self, indices):
        x = self.down(torch.relu(self.up(self.table(indices))))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(x), self.tiny(x)


INDICES = torch.arange(6).view(2, 3)


def test_each_layer_says_what_becomes_of_it():
    report = kbit.explain(Model(), INDICES, config={"overrides": {"up": {"bits": 2}}, "skip": ["down"]})
    assert [layer.name for layer in report.matched] == ["table", "up"]
    up = report.layer("up")
    assert (up.shape, up.config.bits, up.kernels) == ((128, 64), 2, ("cpu",))
    assert up.bytes_before == 128 * 64 * 4
    assert up.bytes_after == 128 * 64 * 2 // 8 + 128 * 2 * 2 + 128  # codes, scale and offset, header and tail
    assert 0 < up.error < 0.2
    assert set(up.rejected) == {kernel.name for kernel in KERNELS} - {"cpu"}
    assert report.layer("table").uses == ("embedding", "linear")
    assert "'skip'" in report.layer("down").reasons[0]
    assert "too small" in report.layer("tiny").reasons[0]
    assert "no captured graph" in report.layer("unused").reasons[0]
    with pytest.raises(KeyError):
        report.layer("nobody")


def test_the_table_shows_every_layer_and_the_totals():
    report = kbit.explain(Model(), INDICES)
    text = str(report)
    for layer in report.layers:
        assert layer.name in text
    assert f"{sum(layer.bytes_after for layer in report.layers):,}" in text


def test_layers_that_are_alike_are_one_line_of_a_narrow_table():
    def layer(name, rows):
        return LayerReport(
            name, (rows, 64), True, ("told once",), ("linear",), kbit.Config().for_layer(""), 9, 3, rows / 1e4, ("cpu",)
        )

    layers = [layer(f"model.layers.{i}.self_attn.{name}", 64 + i // 3) for i in range(4) for name in ("query_proj", "value_proj")]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(kbit.Explanation((layer("model.embed_tokens", 64), *layers), 1, {}))
    cells = [line.split() for line in console.export_text(clear=False).splitlines()]
    assert ["model.layers.0-2"] in cells and ["model.layers.3"] in cells
    assert ["self_attn.query_proj", "64", "x", "64", "4", "27", "9", "0.0064"] in cells
    assert ["self_attn.value_proj", "65", "x", "64", "4", "9", "3", "0.0065"] in cells
    assert "told once (model.embed_tokens, model.layers.0-3.self_attn.query_proj" in console.export_text()


class Page(HTMLParser):
    """The texts of a page by element, and whether it asks for anything outside of it."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.graphs, self.outside = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open = tag
        self.outside += [name for name, _ in attributes if name in ("src", "href")]

    def handle_data(self, data):
        {"td": self.cells, "pre": self.graphs}.get(self.open, []).append(data.strip())


def test_the_page_shows_layers_and_graphs_and_needs_nothing_else(tmp_path):
    report = kbit.explain(Model(), INDICES, config={"skip": ["down"]}, html=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert all(layer.name in page.cells for layer in report.layers)
    assert not page.outside and "//" not in text.replace("<!doctype", "").split("<h2>")[0]
    assert "placeholder" in page.graphs[0] and "kbit.linear_cpu" not in page.graphs[0]
    assert any("kbit.linear_cpu" in graph for graph in page.graphs)


def test_a_page_takes_no_name_for_markup(tmp_path):
    model = nn.Sequential()
    model.add_module("<b>&", nn.Linear(64, 64))
    kbit.explain(model, torch.randn(2, 64), html=tmp_path / "report.html")
    assert "<b>&" in Page((tmp_path / "report.html").read_text()).cells


def test_fusions_are_counted_over_all_graphs():
    report = kbit.explain(Model(), INDICES)
    assert report.fusions == {"activation": 1, "chained": 3}  # relu into up; up, down and head follow one another
    assert "fused: activation 1, chained 3" in str(report)
    assert kbit.explain(nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)).fusions == {}


def test_graph_breaks_are_counted_and_tied_weights_told_once():
    report = kbit.explain(Model(breaks=True), INDICES)
    assert report.graphs == 2
    assert len(report.graph_breaks) == 1
    assert report.layer("table = head").uses == ("embedding", "linear")
    assert kbit.explain(Model(), INDICES).graph_breaks == {}


def test_a_compiled_model_can_be_explained_and_keeps_its_graph():
    model = Model()
    compiled = torch.compile(model, backend="kbit")
    with torch.no_grad():
        before = compiled(INDICES)
        assert kbit.explain(compiled, INDICES).matched
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = compiled(INDICES)
    assert torch.equal(before[0], after[0])


def test_a_released_model_can_be_explained():
    model = Model()
    with torch.no_grad():
        torch.compile(model, backend="kbit", options={"release_weights": True})(INDICES)
    assert kbit.explain(model, INDICES, config={"release_weights": True}).layer("up").error > 0


def test_mistakes_are_our_own_errors():
    with pytest.raises(kbit.UnknownOptionError):
        kbit.explain(Model(), INDICES, config={"bit": 3})
    with pytest.raises(kbit.UnmatchedOverrideError, match=r"'upp'.*up"):
        kbit.explain(Model(), INDICES, config={"overrides": {"upp": {"bits": 3}}})
    with pytest.raises(kbit.ModelCallError, match="call failed"):
        kbit.explain(Model(), torch.tensor([1.5]))
    broken = Model()
    broken.up.weight.data[3, 3] = float("inf")
    with pytest.raises(kbit.NonFiniteWeightError, match="'up'"):
        kbit.explain(broken, INDICES)


def test_nothing_is_kept_packed():
    from kbit_inductor.weights.store import STORE

    model = Model()
    kbit.explain(model, INDICES)
    assert not STORE.packed_forms(model.up.weight)
