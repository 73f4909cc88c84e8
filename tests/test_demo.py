"""The demo's parts on a tiny model with random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from rich.console import Console

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import demo  # noqa: E402 (benchmarks/ holds scripts: it is on the path only when one of them is run)
import measure  # noqa: E402
import report  # noqa: E402
import smollm2  # noqa: E402

VOCABULARY = 160


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def tiny_inputs() -> smollm2.Inputs:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(VOCABULARY, (32,), generator=generator).tolist()
    return smollm2.Inputs(text, prompt=[1, 5, 9, 2], window=16, new_tokens=4)


def as_results(rows: list[measure.Row]) -> dict[str, Any]:
    shown = [vars(row) | {"text": "some text"} for row in rows]
    return demo.gather(shown, tiny_inputs(), {"kernels": 0.0, "reading": 1.0, "all": 9.0})


@pytest.fixture(scope="module")
def rows() -> list[measure.Row]:
    return [measure.measure(tiny_model(), tiny_inputs(), variant) for variant in ("eager", "8")]


def test_rows_hold_what_they_say(rows: list[measure.Row]) -> None:
    floats, eight = rows
    assert floats.weight_bytes == pytest.approx(4 * floats.parameters, rel=0.01)
    # 64 columns and more in groups of 64: half a bit for scale and offset, and the norms stay in float.
    assert eight.weight_bytes == pytest.approx(8.5 / 8 * eight.parameters, rel=0.05)
    assert eight.perplexity == pytest.approx(floats.perplexity, rel=0.01)
    for row in rows:
        assert len(row.generated) == tiny_inputs().new_tokens
        assert 0 < row.decode_bytes <= row.peak_bytes
        assert min(row.tokens_per_second, row.first_call, row.first_decode, row.window_seconds) > 0


def test_layers_share_a_graph(rows: list[measure.Row]) -> None:
    model, inputs = tiny_model(), tiny_inputs()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter)
    with torch.no_grad():
        measure.decode(model, measure.empty_cache(model, 8), inputs.prompt, inputs.new_tokens)
    assert counter.frame_count == 1


def test_perplexity_is_that_of_the_definition() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    value, _ = measure.perplexity(model, inputs)
    losses = [model(input_ids=ids, labels=ids).loss for ids in torch.tensor(inputs.text).view(2, 1, 16)]
    assert value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


@torch.no_grad()
def test_decode_is_greedy_generation() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    cache = measure.empty_cache(model, len(inputs.prompt) + inputs.new_tokens)
    tokens, _ = measure.decode(model, cache, inputs.prompt, inputs.new_tokens)
    expected = list(inputs.prompt)
    for _ in range(inputs.new_tokens):
        expected.append(int(model(input_ids=torch.tensor([expected]), use_cache=False).logits[0, -1].argmax()))
    assert tokens == expected[len(inputs.prompt) :]


def test_a_row_is_measured_by_a_process_of_its_own(tmp_path: Path) -> None:
    smollm2.save(tmp_path, tiny_model(), tiny_inputs())
    phases: list[str] = []
    row = demo.measure_apart(tmp_path, "eager", say=phases.append)
    assert row["perplexity"] == pytest.approx(measure.perplexity(tiny_model(), tiny_inputs())[0], rel=1e-4)
    assert "perplexity" in phases
    # What was measured before the process loaded the model is not its peak.
    assert row["start_bytes"] <= row["peak_bytes"]


def test_a_failing_row_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "measure.py").write_text("print('no JSON')\nraise RuntimeError('the reason')")
    monkeypatch.setattr(demo, "HERE", tmp_path)
    with pytest.raises(SystemExit, match=r"(?s)float32 eager failed.*the reason"):
        demo.measure_apart(tmp_path, "eager")


def test_table_json_and_picture(rows: list[measure.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = as_results(rows)
    demo.show(results, Console(width=160))
    printed = capsys.readouterr().out
    for expected in ("float32 eager", "kbit 8 bits", "perplexity", "Q4_1", "some text"):
        assert expected in printed
    written = json.loads(report.write_json(results, tmp_path).read_text(encoding="utf-8"))
    assert [row["variant"] for row in written["rows"]] == ["eager", "8"]
    assert written["protocol"]["window"] == 16
    picture = report.write_picture(results, tmp_path)
    assert picture.name == "bits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_block_of_a_page_is_replaced(rows: list[measure.Row], tmp_path: Path) -> None:
    page = tmp_path / "demo.md"
    page.write_text(f"before\n<!-- {report.MARK}: begin -->\nold\n<!-- {report.MARK}: end -->\nafter\n")
    for _ in range(2):
        report.write(as_results(rows), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and text.count("| kbit 8 bits |") == 1
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="no lines"):
        report.write(as_results(rows), page)
    assert f"<!-- {report.MARK}: begin -->" in (REPOSITORY / "docs" / "demo.md").read_text(encoding="utf-8")


def test_text_and_licence_are_carried() -> None:
    assert 8_000 <= smollm2.TEXT.stat().st_size <= 12_000
    assert "CC BY-SA" in (smollm2.TEXT.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("bits", ["9", "0", "four", "4,"])
def test_bits_are_checked(bits: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--bits", bits])
    assert "1 to 8" in capsys.readouterr().err
