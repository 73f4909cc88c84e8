"""How well similarities of sentences follow people's at total bits: all-MiniLM-L6-v2 on STS-B, ours and other libraries'.

Protocol: Spearman's correlation of the cosine of two sentences' vectors with the score that people gave, and 95 % intervals by
resampling the pairs. Matrices are rounded, and bits counted, as for language models (``quality/run.py``). Calibration sees other
sentences.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from cpu import minilm  # noqa: E402
from rich.console import Console  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import kbit_inductor as kbit  # noqa: E402
from quality.methods import Method, methods  # noqa: E402
from quality.rounding import rounded  # noqa: E402

OUTPUT = HERE.parent / "results"
FAMILIES = ("kbit default", "kbit gptq", "HQQ", "torchao", "quanto", "bitsandbytes", "llama.cpp")
RESAMPLES = 1000


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write ``sentences.json`` and ``sentences.md`` after each row."""
    options = _parse(arguments)
    console, encoder, tokenizer = Console(), minilm.read(), AutoTokenizer.from_pretrained(minilm.folder())
    pairs = minilm.read_pairs(options.pairs)[: options.count]
    others = minilm.read_pairs(options.calibration)[: options.sentences // 2]
    seen = dict(tokenizer([text for pair in others for text in pair[:2]], padding=True, return_tensors="pt"))
    calibration = kbit.calibrate(encoder.model, seen, {"quantizer": "gptq"})
    protocol = {"text": options.pairs.name, "pairs": len(pairs), "calibration": options.calibration.name}
    results: dict[str, Any] = {"protocol": {**protocol, "sentences": 2 * len(others)}}
    results["rows"] = [{"family": "float32", "name": "", "bits": 32.0, **correlation(encoder, tokenizer, pairs)}]
    if options.keep:
        results = merged(options.output / "sentences.json", results)
    for method in methods():
        wanted = any(each in f"{method.family} {method.name}" for each in options.only)
        if wanted and method.family.startswith(FAMILIES) and method.text == "other":
            found = row(method, encoder, calibration, tokenizer, pairs)
            results["rows"] = [*(each for each in results["rows"] if not _is_of(each, method)), found]
            console.print(found, highlight=False, soft_wrap=True)
            _write(results, options.output)


def _is_of(row: Mapping[str, Any], method: Method) -> bool:
    return (row["family"], row["name"]) == (method.family, method.name)


def _write(results: Mapping[str, Any], folder: Path) -> None:
    (folder / "sentences.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "sentences.md").write_text("\n".join(lines(results)) + "\n", encoding="utf-8")


def row(method: Method, encoder: minilm.Encoder, calibration: kbit.Calibration, tokenizer: Any, pairs: Any) -> dict[str, Any]:
    """The results of one method, or why there are none."""
    named: dict[str, Any] = {"family": method.family, "name": method.name}
    if (missing := method.reason_missing()) is not None:
        return {**named, "missing": missing}
    with rounded(method, encoder.model, calibration) as bits:
        return {**named, "bits": bits, **correlation(encoder, tokenizer, pairs)}


@torch.no_grad()
def correlation(encoder: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    """Spearman's, with its interval."""
    vectors: Tensor = minilm.vectors(encoder, tokenizer, [text for pair in pairs for text in pair[:2]])
    cosine, scores = (vectors[0::2] * vectors[1::2]).sum(1).numpy(), np.array([score for _, _, score in pairs])
    picked = np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    resampled = [spearmanr(cosine[each], scores[each]).statistic for each in picked]
    return {"spearman": float(spearmanr(cosine, scores).statistic), "interval": np.percentile(resampled, [2.5, 97.5]).tolist()}


def merged(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """``results`` with the rows of the file ``path`` that they lack; these alone where the file is of another protocol."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if earlier.get("protocol") != results["protocol"]:
        return results
    rows = {(each["family"], each["name"]): each for part in (earlier, results) for each in part["rows"]}
    return {**results, "rows": list(rows.values())}


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The table in markdown."""
    protocol = results["protocol"]
    yield (
        f"{protocol['text']}: {protocol['pairs']} pairs; calibration: {protocol['sentences']} sentences of "
        f"{protocol['calibration']}; 95 % intervals by resampling pairs.\n"
    )
    yield "| method | | bits per weight | Spearman | 95 % |"
    yield "| --- | --- | ---: | ---: | --- |"
    for each in results["rows"]:
        if "missing" in each:
            yield f"| {each['family']} | {each['name']} | {each['missing']} | | |"
        else:
            low, high = each["interval"]
            yield f"| {each['family']} | {each['name']} | {each['bits']:.3f} | {each['spearman']:.4f} | {low:.4f}–{high:.4f} |"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--pairs", type=Path, required=True, help="CSV of two sentences and a score in each line")
    parser.add_argument("--calibration", type=Path, required=True, help="another one")
    parser.add_argument("--count", type=int, default=None, help="of pairs, the first ones (default: all)")
    parser.add_argument("--sentences", type=int, default=256, help="for calibration (default: 256)")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose family and name hold one of these")
    parser.add_argument("--keep", action="store_true", help="keep rows of an earlier run that this one does not take")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
