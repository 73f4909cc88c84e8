"""One stored weight at every precision: its error, its time, and what drafts of few planes gain. Writes ``results/cascade.json``.

``python benchmarks/cascade.py --models FOLDER…`` measures; ``--page`` writes the tables of docs/cascade.md from the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from page import replace
from rich.console import Console
from torch import Tensor

import kbit_inductor as kbit
from kbit_inductor.kernels.cpu import build
from kbit_inductor.quantizers import Format, cascade, clip

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "cascade.json", HERE.parent / "docs" / "cascade.md"
GROUP = 64
BITS = range(1, 9)
COLD = 96 << 20  # bytes of copies: more than any cache


def errors(folder: Path) -> dict[str, Any]:
    """Squared error of a cascade over that of the clip search at each precision: of all matrices of a model, and of the worst."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = [parameter.detach() for parameter in model.parameters() if parameter.dim() == 2]
    return {"model": folder.name, **_ratios(weights, GROUP)}


def random_errors() -> list[dict[str, Any]]:
    """The same of random weights, in groups of different sizes, and with heavy tails."""
    gaussian = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
    factors = torch.randn(256, 2048, generator=torch.Generator().manual_seed(1)).exp()
    kinds = [(f"Gaussian, groups of {size}", gaussian, size) for size in (16, 32, 64, 128, 2048)]
    kinds.append(("Gaussian times log-normal, groups of 64", gaussian * factors, GROUP))
    return [{"model": name, **_ratios([weight], size)} for name, weight, size in kinds]


def _ratios(weights: Sequence[Tensor], group_size: int) -> dict[str, Any]:
    ours, theirs = [], []
    for weight in weights:
        norm = float(weight.square().sum())
        ours.append([error * norm for error in cascade(weight, Format(8, group_size)).errors])
        theirs.append([clip(weight, Format(bits, group_size)).error * norm for bits in BITS])
    one, other = torch.tensor(ours), torch.tensor(theirs)
    return {"all": (one.sum(0) / other.sum(0)).tolist(), "worst": (one / other).amax(0).tolist()}


def times(rows: int, columns: int, tokens: int, rounds: int) -> list[dict[str, float]]:
    """Microseconds of a product at each precision, read from a cascade and from a weight of so many bits, in turn."""
    build.load()
    groups = columns // GROUP
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    grids = torch.rand(8, rows, groups).half()
    x = torch.randn(tokens, columns)

    def tiled(bits: int, nested: bool) -> list[Tensor]:
        grid = (grids, grids) if nested else (grids[0], grids[0])
        one = torch.ops.kbit.tile_cpu(codes >> (8 - bits), *grid, torch.ones(1), bits, GROUP, cascade=nested)
        return [one, *(one.clone() for _ in range(COLD // (rows * columns * bits // 8)))]

    nested = tiled(8, True)
    found = []
    for bits in BITS:
        alone = tiled(bits, False)
        measured: dict[str, list[float]] = {"cascade": [], "alone": []}
        for _ in range(rounds):
            with kbit.precision(bits):
                measured["cascade"].append(_seconds(x, nested, rows))
            measured["alone"].append(_seconds(x, alone, rows))
        found.append({"bits": bits, **{name: 1e6 * statistics.median(each) for name, each in measured.items()}})
    return found


def _seconds(x: Tensor, weights: Sequence[Tensor], rows: int) -> float:
    start = time.perf_counter()
    for weight in weights:
        torch.ops.kbit.linear_cpu(x, weight, None, rows, 8)
    return (time.perf_counter() - start) / len(weights)


def speculative(folder: Path, text: Path, new: int, drafts: Sequence[int]) -> dict[str, Any]:
    """Tokens per second of greedy decoding at 8 bits, by itself and with drafts of few planes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8")[:4000], return_tensors="pt").input_ids[:, :64]
    kbit.quantize_(model, {"bits": 8, "cascade": True, "group_size": GROUP})
    generator = kbit.Generator(model, 64 + new)
    expected, plain = _text(generator, ids)
    rows = []
    for tokens in drafts:
        drafting = kbit.SpeculativeGenerator(model, 64 + new, draft_tokens=tokens, draft_bits=2)
        for bits in range(2, 7):
            drafting.draft_bits, drafting.rounds, drafting.accepted = bits, 0, 0
            found, speed = _text(drafting, ids)
            same = int((found == expected).long().cumprod(-1).sum()) - ids.shape[1]
            row = {"draft_tokens": tokens, "draft_bits": bits, "tokens_per_second": speed, "same": same}
            rows.append({**row, "accepted_length": drafting.accepted_length, "speedup": speed / plain})
    return {"model": folder.name, "threads": torch.get_num_threads(), "new_tokens": new, "tokens_per_second": plain, "rows": rows}


def _text(generator: kbit.Generator, ids: Tensor) -> tuple[Tensor, float]:
    """A greedy text, and tokens per second of the best of three runs after a first."""
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        text = generator.generate(ids, eos_token_id=())
        best = max(best, (text.shape[1] - ids.shape[1]) / (time.perf_counter() - start))
    return text, best


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The tables of the page."""
    bits = " | ".join(str(k) for k in BITS)
    rule = " ---: |" * len(BITS)
    yield f"Squared error over that of `clip` at the same bits, of all matrices of a model in groups of {GROUP} (of the worst):\n"
    yield f"| | {bits} |\n| --- |{rule}"
    for row in results.get("errors", ()):
        both = zip(row["all"], row["worst"], strict=True)
        yield (
            f"| {row['model']} | "
            + " | ".join(f"{total:.3f}" + f" ({worst:.3f})" * (worst != total) for total, worst in both)
            + " |"
        )
    for row in results.get("times", ()):
        yield (
            f"\nMicroseconds of a product, {row['rows']}x{row['columns']}, {row['tokens']} row(s) of x, cold weights, "
            f"{row['threads']} thread(s):\n\n| read from | {bits} |\n| --- |{rule}"
        )
        for name, key in (("the cascade", "cascade"), ("a weight of so many bits", "alone")):
            yield f"| {name} | " + " | ".join(f"{each[key]:.0f}" for each in row["bits"]) + " |"
    for row in results.get("speculative", ()):
        threads = f"{row['threads']} thread(s)"
        speed = f"{row['tokens_per_second']:.0f} tokens a second by itself"
        yield f"\nGreedy decoding of {row['new_tokens']} tokens at 8 bits, {row['model']}, {threads}: {speed}. With drafts:\n"
        head = (
            "tokens of a draft",
            "its bits",
            "tokens a round",
            "tokens a second",
            "against none",
            "tokens until the texts differ",
        )
        yield "| " + " | ".join(head) + " |\n|" + " ---: |" * len(head)
        for each in row["rows"]:
            same = "never" if each["same"] == row["new_tokens"] else str(each["same"])
            yield (
                f"| {each['draft_tokens']} | {each['draft_bits']} | {each['accepted_length']:.2f} | "
                f"{each['tokens_per_second']:.0f} | {each['speedup']:.2f} | {same} |"
            )


def write_page() -> None:
    """Replace what stands between the markers in the page."""
    replace(PAGE, "results", markdown(json.loads(RESULTS.read_text(encoding="utf-8"))))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts that are asked for, and keep the others as they were."""
    options = _parse(arguments)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    console = Console()

    def part(name: str, measure: Callable[[], Any]) -> None:
        if name in options.only:
            results[name] = measure()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            console.print(f"{name}: done")

    with torch.no_grad():
        part("errors", lambda: [*map(errors, options.models), *random_errors()])
        sizes = [{"rows": n, "columns": n, "tokens": tokens} for n in options.sizes for tokens in (1, 4)]
        part(
            "times",
            lambda: [{**size, "threads": torch.get_num_threads(), "bits": times(**size, rounds=options.rounds)} for size in sizes],
        )
        texts = [(folder, options.text, options.new) for folder in options.models[-1:]]
        part("speculative", lambda: [speculative(*each, options.drafts) for each in texts])
    if options.page:
        write_page()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of causal language models; the last one writes")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "wikitext2-test-excerpt.txt", help="whose start is continued")
    parser.add_argument("--new", type=int, default=128, help="tokens to write (default: 128)")
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4], help="tokens of a draft (default: 2 4)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096], help="rows and columns of a product (default: 4096)")
    parser.add_argument("--rounds", type=int, default=15, help="of each time (default: 15)")
    parser.add_argument("--only", nargs="*", default=["errors", "times", "speculative"], help="parts to measure")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/cascade.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
