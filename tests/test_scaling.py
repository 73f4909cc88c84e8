"""Scaling laws: a law that is known is found again, a sweep goes on where it stopped, and what is written is what was measured."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("scipy", reason="the law is fitted by scipy")
pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib")

import kbit_inductor as kbit
from kbit_inductor import LayerConfig
from kbit_inductor.packing import pack
from kbit_inductor.scaling import Row, Study, fit, sweep
from kbit_inductor.scaling.fit import NAMES, predicted
from kbit_inductor.scaling.study import formats

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = 64
pytestmark = pytest.mark.usefixtures("one_thread_without_grad")


def planted(values, noise=0.0, windows=8, bits=(2, 3, 4, 6, 8), sizes=(3e5, 1e6, 3e6, 1e7)):
    """Rows of a family that follows the law ``values``."""
    random = np.random.default_rng(0)
    rows = []
    for size in sizes:
        for k in (None, *bits):
            loss = float(predicted(np.array(values), np.array(size / max(sizes)), np.array(math.inf if k is None else k)))
            around = tuple(loss * (1 + noise * random.standard_normal(windows)))
            total = int(size * (16 if k is None else k + 0.5))
            rows.append(Row(f"{size:g}", int(size), k, "" if k is None else "a format", total, around, (0.0,) * windows, 1.0))
    return rows


@settings(max_examples=8)
@given(
    e=st.floats(1.0, 3.0), b=st.floats(0.3, 2.0), alpha=st.floats(0.2, 0.8), a=st.floats(2.0, 20.0), gamma=st.floats(0.5, 1.2),
    beta=st.floats(-0.3, 0.3),
)  # fmt: skip
def test_a_law_that_is_known_is_found(e, b, alpha, a, gamma, beta):
    values = (e, b, alpha, a, gamma, beta)
    (law,) = fit(planted(values), resamples=2)
    assert law.misfit < 1e-5
    for size, bits in ((3e5, 3), (1e7, 2), (2e6, 5), (1e7, math.inf)):
        expected = float(predicted(np.array(values), np.array(size / 1e7), np.array(bits)))
        assert law.loss(size, bits) == pytest.approx(expected, rel=1e-4)


def test_intervals_and_choices():
    values = (2.0, 1.0, 0.4, 10.0, 0.8, 0.0)
    rows = planted(values, noise=0.002)
    (law,) = fit(rows, resamples=40)
    console = Console(file=io.StringIO(), width=200)
    console.print(Study(tuple(rows), (law,)))
    assert "misfit" in console.file.getvalue() and "extrapolated" in console.file.getvalue()
    assert all(low <= law.values[name] <= high or high - low < 1e-6 for name, (low, high) in law.intervals.items())
    assert all(0 <= choice.share <= 1 for choice in law.choices)
    for choice in law.choices:  # none of the other bits is better at that size, by the law itself
        losses = {k: law.loss(choice.total_bits / rate, k) for k, rate in law.bits_per_parameter.items()}
        assert min(losses, key=losses.get) == choice.bits and losses[choice.bits] == pytest.approx(choice.loss)
        size = choice.total_bits / law.bits_per_parameter[choice.bits]
        assert choice.extrapolated == (not 3e5 <= size <= 1e7)
    assert law.choices[-1].extrapolated and not law.choices[len(law.choices) // 2].extrapolated


@pytest.mark.parametrize("kept, message", [({"sizes": (1e6, 2e6)}, "three different sizes"), ({"bits": (3, 4)}, "needs three")])
def test_too_little_for_a_law(kept, message):
    with pytest.raises(kbit.InvalidOptionError, match=message):
        fit(planted((2.0, 1.0, 0.4, 10.0, 0.8, 0.0), **kept))


def tiny(width):
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY, tie_word_embeddings=True, initializer_range=0.2)).eval()


MODELS = {str(width): lambda width=width: tiny(width) for width in (16, 32, 64)}
WINDOWS = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))


def test_what_is_measured(tmp_path):
    configs = formats([2, 8], [16], ["uniform", "normal"], ["rtn"])
    assert [(config.bits, config.codebook) for config in configs] == [(2, "uniform"), (8, "uniform"), (2, "normal")]
    rows = sweep(MODELS, WINDOWS, configs, tmp_path)
    assert len(rows) == 3 * 4
    for row in rows:
        model = tiny(int(row.model))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        rest = parameters - sum(matrix.numel() for matrix in matrices)
        total = 16 * parameters
        if row.bits is not None:
            config = next(c for c in configs if (c.bits, c.codebook) == (row.bits, row.format.split(", ")[1]))
            packed = [pack(matrix, config) for matrix in matrices]
            total = sum(8 * one.nbytes for one in packed) + 16 * rest
            for matrix, one in zip(matrices, packed, strict=True):
                matrix.copy_(one.dequantize())
        losses = [float(model(window[None], labels=window[None]).loss) for window in WINDOWS]
        assert (row.parameters, row.total_bits) == (parameters, total)
        assert row.loss == pytest.approx(losses, rel=1e-4)
        assert (row.divergence == (0.0,) * 3) == (row.bits is None) and min(row.divergence) >= 0


def test_it_goes_on_where_it_was_interrupted(tmp_path):
    configs = [LayerConfig(bits, 16) for bits in (2, 3, 4)]
    whole = sweep(MODELS, WINDOWS, configs, tmp_path / "whole")
    loaded = []

    def loading(name):
        loaded.append(name)
        if loaded == ["16", "32"]:
            raise KeyboardInterrupt
        return MODELS[name]()

    models = {name: lambda name=name: loading(name) for name in MODELS}
    with pytest.raises(KeyboardInterrupt):
        sweep(models, WINDOWS, configs, tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text()[:-20])  # as a process that was killed while it wrote leaves it
    assert sweep(models, WINDOWS, configs, tmp_path) == whole
    assert loaded == ["16", "32", "16", "32", "64"]
    assert sweep(models, WINDOWS, configs, tmp_path) == whole and len(loaded) == 5
    with pytest.raises(kbit.InvalidOptionError, match="another text"):
        sweep(models, WINDOWS + 0 * WINDOWS[:, :1] - (WINDOWS > 0).long(), configs, tmp_path)
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(kbit.CorruptModelError, match="damaged"):
        sweep(models, WINDOWS, configs, tmp_path)


def test_mistakes_say_what_to_do(tmp_path):
    with pytest.raises(kbit.InvalidOptionError, match="windows"):
        kbit.scaling(MODELS, WINDOWS[:, :1], tmp_path)
    with pytest.raises(kbit.InvalidOptionError, match="quantizer"):
        kbit.scaling(MODELS, WINDOWS, tmp_path, quantizers=["nearest"])
    with pytest.raises(kbit.InvalidOptionError, match="no float matrix"):
        kbit.scaling({"packed": lambda: kbit.quantize_(tiny(32), {"min_elements": 0})}, WINDOWS, tmp_path)


def test_from_a_text_to_a_picture(tmp_path):
    """The script that trains a family, and the command on it."""
    pytest.importorskip("tokenizers", reason="the script trains a tokenizer")
    from typer.testing import CliRunner

    from kbit_inductor.cli import app

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    import train_family

    text, family = tmp_path / "text.txt", tmp_path / "family"
    text.write_text((REPOSITORY / "benchmarks" / "data" / "wikitext2-test-excerpt.txt").read_text(encoding="utf-8")[:40000])
    sizes = ["32x1", "32x2", "64x1"]
    arguments = [str(text), str(family), "--vocabulary", "300", "--steps", "3", "--batch", "2", "--length", "32", "--device", "cpu"]
    with torch.enable_grad():
        train_family.main([*arguments, "--sizes", *sizes])
    trained = json.loads((family / "32x1" / "training.json").read_text())
    assert trained["tokens_seen"] == 3 * 2 * 32 and 0 < trained["eval_loss"] < 2 * math.log(300)
    folders = [str(family / size) for size in sizes]
    told = [
        "--text",
        str(family / "eval.txt"),
        "--output",
        str(tmp_path / "out"),
        "--bits",
        "2,4,8",
        "--length",
        "32",
        "--windows",
        "4",
    ]
    result = CliRunner().invoke(app.app, ["scaling", *folders, *told, "--json"])
    assert result.exit_code == 0, result.output
    (law,) = json.loads(result.stdout)["laws"]
    assert set(law["values"]) == set(NAMES)
    with (tmp_path / "out" / "scaling.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 4
    assert all((tmp_path / "out" / name).stat().st_size > 1000 for name in ("scaling.json", "scaling.png", "scaling.svg"))
    wrong = CliRunner().invoke(app.app, ["scaling", *folders, *told, "--bits", "2;4"])
    assert wrong.exit_code == 1 and "commas" in wrong.stderr
