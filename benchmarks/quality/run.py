"""Quality of weights against their total bits, ours and other libraries', on models in Hugging Face folders.

Protocol: the first windows of the text that do not overlap, each without a start token; every token but the first of a window is
predicted. All matrices are rounded, tables and heads among them, and activations stay in float. Bits are counted from the bytes of
all matrices, scales and codebooks included. Calibration sees another text.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from quality import measures, methods, report  # noqa: E402
from quality.subject import Subject  # noqa: E402

OUTPUT = HERE.parent / "results"
TOTALS = [2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``quality.json``, ``quality.md``, ``standing.md`` and ``quality.png``."""
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
    subject = Subject(model, text, _windows(tokenizer, options.calibration, options.length, options.calibration_windows))
    rows = [{"family": "float32", "name": "", "bits": 32.0, **subject.scores(subject.exact)}]
    for name, row in _rows(subject, options):
        if any(wanted in name for wanted in options.only):
            rows.append(row())
            console.print(report.line(folder.name, rows[-1], rows[0]), highlight=False, soft_wrap=True)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "rows": rows}


def _rows(subject: Subject, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The family and name of each row, and what measures it."""
    for method in methods.methods():
        yield f"{method.family} {method.name}", functools.partial(subject.row, method)
    for average in options.averages:
        asked = {"average_bits": average}
        yield f"kbit auto {average:g} bits", functools.partial(subject.planned, "kbit auto", f"{average:g} bits", asked, "other")
    for bits in options.totals:
        family, name = "kbit auto on own text", f"{bits:g} bits in all"
        asked = {"memory_budget": subject.budget(bits), "group_size": 128}
        yield f"{family} {name}", functools.partial(subject.planned, family, name, asked, "own")


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
    parser.add_argument(
        "--totals", type=float, nargs="*", default=TOTALS, help="bits in all of a weight, for bits='auto' under a memory budget"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose family and name hold one of these")
    parser.add_argument(
        "--keep", action="store_true", help="keep rows of an earlier run of the same protocol that this one does not take"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
