"""What floats beside the codes gain at their total bits, and what scaled channels gain, on models in folders.

The protocol is that of ``run.py``, with the model as ``quantize_`` leaves it; tables and heads have ``end_bits``. Floats count as
many bits as those of the folder. Calibration is text that the model has written.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import kbit_inductor as kbit  # noqa: E402
from kbit_inductor.models.surgery import packed_matrices  # noqa: E402
from quality import measures  # noqa: E402

OUTPUT = HERE.parent / "results"
SCALED = "scale_channels_"  # no option, but done before
TERMS: tuple[dict[str, Any], ...] = (
    {}, {"group_size": 32}, {"low_rank": 2}, {"low_rank": 8}, {"outliers": 0.01}, {"outliers": 0.03}, {"bias_correction": True},
    {SCALED: True},
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``side_terms.json`` and ``side_terms.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of causal language models")
    parser.add_argument("--text", type=Path, required=True, help="text file to predict")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=int, default=16, help="windows of the text (default: 16)")
    parser.add_argument("--calibration-windows", type=int, default=8, help="windows for calibration (default: 8)")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3], help="bits per code (default: 2 3)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the results")
    options = parser.parse_args(arguments)
    protocol = {"text": options.text.name, "window": options.length, "windows": options.windows, "torch": torch.__version__}
    results = {"protocol": protocol, "models": {folder.name: list(_rows(folder, options)) for folder in options.models}}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "side_terms.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.output / "side_terms.md").write_text("\n".join(_lines(results)) + "\n", encoding="utf-8")


def _rows(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    wide = copy.deepcopy(model).float()
    tokens = AutoTokenizer.from_pretrained(folder)(options.text.read_text(encoding="utf-8"))["input_ids"]
    text = measures.windows(tokens, options.length, options.windows)
    data = kbit.own_text(wide, options.calibration_windows, options.length).split(1)
    exact, console = measures.logits(wide, text), Console()
    best = measures.score(exact, exact, text).summary()
    for bits in options.bits:
        for quantizer in ("clip", "gptq"):
            for term in TERMS:
                config = {"bits": bits, "quantizer": quantizer, "activation_bits": 16}
                row = {"options": {**config, **term}, **_measure(model, wide, config, term, data, exact, text)}
                row["over_float"] = measures.relative(row, best)
                console.print(" ".join(_cells(folder.name, row)), highlight=False, soft_wrap=True)
                yield row


@torch.no_grad()
def _measure(
    model: nn.Module, wide: nn.Module, config: dict[str, Any], term: dict[str, Any], data: Sequence[Tensor],
    exact: Sequence[Tensor], text: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """Bits per weight, and the scores of ``model`` packed with ``config`` and ``term``; ``wide`` is the same in float32."""
    if SCALED in term:
        wide = copy.deepcopy(wide)
        kbit.scale_channels_(wide, data, config)
        model = copy.deepcopy(wide).to(model.dtype)  # type: ignore[arg-type]
    else:
        model, config = copy.deepcopy(model), config | term
    calibration = kbit.calibrate(wide, data, config)
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {name: statistics for name, statistics in calibration.layers.items() if name in weights}
    kbit.quantize_(model, config, kbit.Calibration(weights, known))
    matrices = packed_matrices(model)
    stored = sum(matrix.packed.nbytes for matrix in matrices)
    bits = 8 * stored / sum(matrix.rows * matrix.columns for matrix in matrices)
    return {"bits": bits, **measures.score(measures.logits(model.float(), text), exact, text).summary()}


def _cells(model: str, row: dict[str, Any]) -> tuple[str, ...]:
    told = row["options"]
    term = ", ".join(f"{name}={value}" for name, value in told.items() if name not in ("bits", "quantizer", "activation_bits"))
    codes = f"{told['bits']} bits, {told['quantizer']}"
    return model, codes, term or "nothing", f"{row['bits']:.2f}", f"{row['over_float']:+.2%}", f"{row['kl']:.4f}"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    """The table in markdown."""
    protocol = results["protocol"]
    yield f"{protocol['text']}: {protocol['windows']} windows of {protocol['window']} tokens; calibrated on own text.\n"
    yield "| model | codes | with | bits per weight | perplexity over float | KL |"
    yield "| --- | --- | --- | ---: | ---: | ---: |"
    for model, rows in results["models"].items():
        yield from ("| " + " | ".join(_cells(model, row)) + " |" for row in rows)


if __name__ == "__main__":
    main()
