"""Quality of weights against their total bits, ours and other libraries', on models in Hugging Face folders.

Protocol: the first windows of the text that do not overlap, each without a start token; every token but the first of a window is
predicted. All matrices are rounded, tables and heads among them, and activations stay in float. Bits are counted from the bytes of
all matrices, scales and codebooks included. Calibration sees another text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import kbit_inductor as kbit  # noqa: E402
from kbit_inductor.calibration import Calibration  # noqa: E402
from quality import measures, methods, report  # noqa: E402
from quality.rounding import matrices, rounded  # noqa: E402

OUTPUT = HERE.parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``quality.json``, ``quality.md`` and ``quality.png``."""
    options = _parse(arguments)
    console = Console()
    results: dict[str, Any] = {"protocol": _protocol(options), "models": {}}
    for folder in options.models:
        results["models"][folder.name] = measure(folder, options, console)
    if options.keep:
        results = report.merged(options.output, results)
    for path in report.write(results, options.output):
        console.print(f"wrote {path}", soft_wrap=True)


def measure(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All rows of one model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = _windows(tokenizer, options.text, options.length, options.windows)
    data = _windows(tokenizer, options.calibration, options.length, options.calibration_windows)
    texts = {False: data, True: kbit.own_text(model, options.calibration_windows, options.length)}
    calibrations = {own: kbit.calibrate(model, text.split(1), {"quantizer": "gptq"}) for own, text in texts.items()}
    exact = measures.logits(model, text)
    rows = [{"family": "float32", "name": "", "bits": 32.0, **measures.score(exact, exact, text).summary()}]
    for method in methods.methods():
        if any(wanted in f"{method.family} {method.name}" for wanted in options.only):
            seen = calibrations[method.own_text]
            if method.options is not None:
                seen = kbit.calibrate(model, texts[method.own_text].split(1), method.options)
            rows.append(_row(method, model, seen, exact, text))
            console.print(report.line(folder.name, rows[-1], rows[0]), highlight=False, soft_wrap=True)
    if any("kbit auto".startswith(wanted) for wanted in options.only):
        for average in options.averages:
            rows.append(_planned(average, model, calibrations[False], data, exact, text))
            console.print(report.line(folder.name, rows[-1], rows[0]), highlight=False, soft_wrap=True)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "rows": rows}


@torch.no_grad()
def _row(method: methods.Method, model: nn.Module, calibration: Calibration, exact: list[Tensor], text: Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {"family": method.family, "name": method.name}
    if (missing := method.reason_missing()) is not None:
        return {**row, "missing": missing}
    with rounded(method, model, calibration) as bits:
        scores = measures.score(measures.logits(model, text), exact, text)
    return {**row, "bits": bits, **scores.summary()}


def _planned(
    average: float, model: nn.Module, calibration: Calibration, data: Tensor, exact: list[Tensor], text: Tensor
) -> dict[str, Any]:
    """``bits="auto"``, planned on the first of the calibration data."""
    options = {"bits": "auto", "average_bits": average, "quantizer": "gptq", "calibration": calibration}
    plan = kbit.plan(model, options, data[:2].split(1))
    config = plan.apply(options)
    names = {id(module.weight): name for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    layers = {weight: config.for_layer(names[id(weight)]) for weight in matrices(model)}
    bits = iter(layers.values())
    method = methods.Method("kbit auto", f"{average:g} bits", lambda w, s: methods.ours(next(bits), True, w, s))  # type: ignore[arg-type]
    return {**_row(method, model, calibration, exact, text), "verdict": plan.verdict}


def _windows(tokenizer: Any, path: Path, length: int, count: int) -> Tensor:
    # A token is at least a byte; the rest of a long file need not be read.
    with path.open(encoding="utf-8") as file:
        return measures.windows(tokenizer(file.read(16 * length * count))["input_ids"], length, count)


def _protocol(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "text": options.text.name,
        "window": options.length,
        "stride": options.length,
        "windows": options.windows,
        "calibration": options.calibration.name,
        "calibration_tokens": options.length * options.calibration_windows,
        "torch": torch.__version__,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="folders of causal language models")
    parser.add_argument("--text", type=Path, required=True, help="text file to predict")
    parser.add_argument("--calibration", type=Path, required=True, help="another text file, for calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=int, default=32, help="windows of the text (default: 32)")
    parser.add_argument("--calibration-windows", type=int, default=8, help="windows for calibration (default: 8)")
    parser.add_argument("--averages", type=float, nargs="*", default=[2.5, 3.0, 3.5, 4.0], help="average bits of bits='auto'")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose family and name hold one of these")
    parser.add_argument(
        "--keep", action="store_true", help="keep rows of an earlier run of the same protocol that this one does not take"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
