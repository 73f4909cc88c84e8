"""The benchmark of quality per bit on a tiny model: what it counts and measures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from quality import measures, methods, run, side_terms, standing  # noqa: E402

VOCABULARY = 256


def tiny():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY, tie_word_embeddings=True)).eval()


def test_a_model_compared_with_itself_does_not_diverge(one_thread_without_grad):
    model, text = tiny(), measures.windows(range(100), 32, 3)
    assert text.shape == (3, 32)
    exact = measures.logits(model, text)
    summary = measures.score(exact, exact, text).summary()
    assert summary["kl"] == 0 and summary["top1"] == 1
    losses = [float(model(window[None], labels=window[None]).loss) for window in text]
    assert summary["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_windows_end_with_the_text():
    assert measures.windows(range(70), 32, 5).shape == (2, 32)


@pytest.mark.parametrize("method", methods.methods(), ids=lambda method: f"{method.family} {method.name}")
def test_every_method_is_near_the_weight_for_its_bytes(method):
    if method.reason_missing():
        pytest.skip(method.reason_missing())
    torch.manual_seed(0)
    weight = torch.randn(32, 256)
    values, nbytes = method.apply(weight, None)
    bits = 8 * nbytes / weight.numel()
    assert values.shape == weight.shape and 2 < bits < 9
    # Twice what the most careless grid for a Gaussian, from end to end of a group, has at one bit less than all that is stored.
    assert float((values - weight).square().mean()) < 2 * (5 / 2 ** (bits - 1)) ** 2 / 12


def test_the_whole_run_on_a_tiny_model(tmp_path, monkeypatch, one_thread_without_grad):
    monkeypatch.setattr(run.AutoModelForCausalLM, "from_pretrained", lambda folder, dtype: tiny())
    monkeypatch.setattr(run.AutoTokenizer, "from_pretrained", lambda folder: lambda text: {"input_ids": list(text.encode())})
    monkeypatch.setattr(methods, "methods", lambda: [m for m in ALL if m.family == "kbit clip" and m.name in ("2 bits", "4 bits")])
    (tmp_path / "text").write_text("The text that is predicted. " * 20)
    (tmp_path / "other").write_text("Another text for calibration. " * 20)
    run.main(
        ["--models", "tiny", "--text", str(tmp_path / "text"), "--calibration", str(tmp_path / "other"), "--length", "32",
         "--windows", "4", "--calibration-windows", "2", "--averages", "3.5", "--totals", "4.4", "--output", str(tmp_path)]
    )  # fmt: skip
    rows = json.loads((tmp_path / "quality.json").read_text())["models"]["tiny"]["rows"]
    assert [row["family"] for row in rows] == ["float32", "kbit clip", "kbit clip", "kbit auto", "kbit auto on own text"]
    assert rows[1]["kl"] > rows[2]["kl"] > rows[0]["kl"] == 0
    assert 0 < rows[3]["kl"] < 0.01 and "under 3.5 bits on average" in rows[3]["verdict"]
    assert rows[1]["bits"] == pytest.approx(2.5, abs=0.02) and rows[3]["bits"] <= 4.02
    assert 4 < rows[4]["bits"] <= 4.4 and rows[4]["kl"] < rows[1]["kl"]
    monkeypatch.setattr(methods, "methods", lambda: [m for m in ALL if (m.family, m.name) == ("kbit default", "2 bits")])
    run.main(
        ["--models", "tiny", "--text", str(tmp_path / "text"), "--calibration", str(tmp_path / "other"), "--length", "32",
         "--windows", "4", "--calibration-windows", "2", "--only", "default", "--keep", "--output", str(tmp_path)]
    )  # fmt: skip
    more = json.loads((tmp_path / "quality.json").read_text())["models"]["tiny"]["rows"]
    assert more[: len(rows)] == rows and [row["family"] for row in more[len(rows) :]] == ["kbit default"]
    assert more[-1]["kl"] < rows[1]["kl"] and more[-1]["bits"] > rows[1]["bits"]
    assert "| tiny | kbit auto | 3.5 bits |" in (tmp_path / "quality.md").read_text()
    assert (tmp_path / "quality.png").stat().st_size > 0


def row(family, bits, kl, ratio=1.0):
    """Three windows, one of them hard, in the same proportion for every method."""
    windows = [kl * ratio * hardness for hardness in (1, 2, 30)]
    mean = sum(windows) / 3
    return {
        "family": family, "name": "", "bits": bits, "kl": mean, "perplexity": math.exp(mean),
        "windows": {"kl": windows, "perplexity": windows},
    }  # fmt: skip


def test_the_best_of_ours_at_no_more_bits_stands_against_each_of_theirs():
    rows = [
        {"family": "float32", "name": "", "bits": 32.0},
        row("kbit large", 4.0, 0.5),
        row("kbit", 3.0, 0.9),
        row("kbit worse", 2.5, 2.0),
        row("theirs, small", 2.4, 9.0),
        row("theirs", 2.999, 1.0),
        row("theirs, alike", 4.0, 0.5),
        row("theirs, ahead", 3.5, 0.8),
        row("theirs, of no interest", 8.5, 0.1),
        {"family": "theirs", "name": "missing", "missing": "is not installed"},
    ]
    for measure in standing.MEASURES:
        found = standing.standings(rows, measure)
        assert [(each.theirs["family"], each.verdict) for each in found] == [
            ("theirs, small", "none"), ("theirs", "better"), ("theirs, ahead", "worse"), ("theirs, alike", "tie"),
        ]  # fmt: skip
        assert found[1].ours["family"] == found[2].ours["family"] == "kbit" and found[3].ours["family"] == "kbit large"
    better = standing.standings(rows, "kl")[1]  # the hard window is as hard for both, so the ratio is as sure as can be
    assert better.low == pytest.approx(0.9) == better.ratio == pytest.approx(better.high)
    table = "\n".join(standing.lines({"models": {"tiny": {"rows": rows}}}))
    assert "**KL**: better in 1, none in 1, tie in 1, worse in 1 of 4 rows" in table and "| 0.900–0.900 | better |" in table


def test_side_terms_of_a_tiny_model(tmp_path, monkeypatch, one_thread_without_grad):
    monkeypatch.setattr(side_terms.AutoModelForCausalLM, "from_pretrained", lambda folder: tiny().half())
    monkeypatch.setattr(side_terms.AutoTokenizer, "from_pretrained", lambda folder: lambda text: {"input_ids": list(text.encode())})
    monkeypatch.setattr(side_terms, "TERMS", ({}, {"low_rank": 2}, {side_terms.SCALED: True}))
    (tmp_path / "text").write_text("The text that is predicted. " * 20)
    arguments = ["--models", "tiny", "--text", str(tmp_path / "text"), "--length", "32", "--windows", "2", "--bits", "2"]
    side_terms.main([*arguments, "--calibration-windows", "2", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "side_terms.json").read_text())["models"]["tiny"]
    assert [row["options"].get("low_rank", 0) for row in rows] == [0, 2, 0] * 2
    # The term has two floats of 16 bits for each row and column of seven matrices: 4 x 64 + 4 x 64 + 3 x (64 + 128) of each.
    weights = 64 * (VOCABULARY + 4 * 64 + 3 * 128)
    assert rows[1]["bits"] - rows[0]["bits"] == pytest.approx(2 * 16 * (4 * (64 + 64) + 3 * (64 + 128)) / weights)
    assert rows[2]["bits"] == rows[0]["bits"] and rows[2]["kl"] != rows[0]["kl"]
    assert "| tiny | 2 bits, clip | low_rank=2 |" in (tmp_path / "side_terms.md").read_text()


ALL = methods.methods()


def test_sentences_of_a_tiny_model(tmp_path, monkeypatch, one_thread_without_grad):
    sentences = pytest.importorskip("quality.sentences", reason="scipy is not installed")

    class Tokenizer:
        def __call__(self, texts, **options):
            ids = [[ord(letter) % VOCABULARY for letter in text] for text in texts]
            return self.pad({"input_ids": ids}, "max_length", 32) if options.get("padding") else SimpleNamespace(input_ids=ids)

        def pad(self, given, padding, length, return_tensors="pt"):
            ids = torch.tensor([each + [0] * (length - len(each)) for each in given["input_ids"]])
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(f"{'ab' * (n % 7)} c{n},d{n} {'e' * (n % 5)},{n % 6}" for n in range(30)))
    monkeypatch.setattr(sentences.minilm, "read", sentences.minilm.tiny)
    monkeypatch.setattr(sentences.minilm, "folder", lambda: tmp_path)
    monkeypatch.setattr(sentences.AutoTokenizer, "from_pretrained", lambda folder: Tokenizer())
    arguments = ["--pairs", str(path), "--calibration", str(path), "--output", str(tmp_path)]
    sentences.main([*arguments, "--only", "kbit default 4 bits"])
    exact, ours = json.loads((tmp_path / "sentences.json").read_text())["rows"]
    assert (exact["bits"], ours["family"]) == (32, "kbit default") and 4.5 <= ours["bits"] <= 6.6
    assert all(each["interval"][0] <= each["interval"][1] for each in (exact, ours))
    sentences.main([*arguments, "--only", "kbit default 3 bits", "--keep"])
    assert "| kbit default | 4 bits |" in (tmp_path / "sentences.md").read_text()
