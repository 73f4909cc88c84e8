"""Measures one row of the demo in a process of its own: ``python benchmarks/measure.py FOLDER VARIANT [whole]``.

A variant is ``eager``, ``inductor`` or a number of bits; ``whole`` compiles the model as one graph. Each line on standard output is
JSON: ``{"phase": …}`` as the work goes on, then ``{"row": …}``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import smollm2
import torch
from smollm2 import Inputs
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from kbit_inductor.weights.store import STORE

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One row of the table. Sizes are bytes, times seconds; ``parameters`` counts tied weights once.

    ``peak_bytes`` is the highest resident memory of the process from the loaded model to the end, ``decode_bytes`` the highest
    while decoding. ``first_call`` is the first call on a window of text, ``first_decode`` that on a single token; each compiles.
    """

    variant: str
    parameters: int
    weight_bytes: int
    start_bytes: int
    peak_bytes: int
    decode_bytes: int
    perplexity: float
    tokens_per_second: float
    first_call: float
    first_decode: float
    window_seconds: float
    generated: list[int]
    total: float


def compiled(model: PreTrainedModel, variant: str, whole: bool) -> Callable[..., Any]:
    """``model`` as the row ``variant`` runs it: compiled as a whole, or embedding, layers and head each by itself.

    All layers share one graph in the second way, so that it takes seconds where the whole model takes a minute.
    """
    if variant == "eager":
        return model
    if whole:
        return torch.compile(model, **_arguments(variant))
    for layer in model.model.layers:
        layer.compile(**_arguments(variant))
    model.model.embed_tokens = torch.compile(model.model.embed_tokens, **_arguments(variant))
    model.lm_head = torch.compile(model.lm_head, **_arguments(variant))
    return model


def _arguments(variant: str) -> dict[str, Any]:
    if variant == "inductor":
        return {}
    return {"backend": "kbit", "options": {"bits": int(variant), "end_bits": 1, "release_weights": True}}


def perplexity(call: Callable[..., Any], inputs: Inputs) -> tuple[float, float]:
    """Perplexity over windows that do not overlap, and the median seconds of a window.

    Every token but the first of its window is predicted from those before it in the window.
    """
    losses, seconds = [], []
    for window in torch.tensor(inputs.text).view(-1, 1, inputs.window):
        output, elapsed = timed(call, input_ids=window, use_cache=False)
        seconds.append(elapsed)
        losses.append(float(nn.functional.cross_entropy(output.logits[0, :-1].float(), window[0, 1:])))
    return math.exp(statistics.fmean(losses)), statistics.median(seconds)


class Layer(nn.Module):
    """A decoder layer with a cache of its own in place of the model's.

    In transformers a layer finds its tensors in the model's cache by its number. Its compiled graph holds for that number only, so
    that every layer would be compiled again.
    """

    def __init__(self, layer: nn.Module, cache: StaticCache) -> None:
        super().__init__()
        self.layer = layer
        self.cache = cache

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        for name in ("cache", "past_key_values"):  # the name depends on the release of transformers
            if arguments.get(name) is not None:
                arguments[name] = self.cache
        out: Tensor = self.layer(hidden, **arguments)
        return out


def empty_cache(model: PreTrainedModel, length: int, batch: int = 1) -> StaticCache:
    """Give each layer of ``model`` a cache of ``length`` tokens; returns the first, by which the model counts positions.

    The tensors exist from the start, since made inside of a first call they would cost a second compilation. They are copies, since
    the originals are marked as of a fixed address, which would make each layer's graph its own.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    caches = []
    for number, layer in enumerate(model.model.layers):
        cache = StaticCache(config=config, max_cache_len=length)
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        cache.early_initialization(batch, heads, size, model.dtype, model.device)
        for tensor in ("keys", "values", "cumulative_length"):
            setattr(cache.layers[0], tensor, getattr(cache.layers[0], tensor).clone())
        bare = layer.layer if isinstance(layer, Layer) else layer
        bare.self_attn.layer_idx = 0
        model.model.layers[number] = Layer(bare, cache)
        caches.append(cache)
    return caches[0]


def step(call: Callable[..., Any], cache: StaticCache, token: int) -> int:
    """The most likely token after ``token``."""
    logits: Tensor = call(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
    return int(logits[0, -1].argmax())


def decode(call: Callable[..., Any], cache: StaticCache, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
    """Greedy decoding: the new tokens and the median seconds of a step.

    The prompt goes in token by token as well, so that there is one shape to compile.
    """
    for token in prompt[:-1]:
        step(call, cache, token)
    tokens, seconds = [prompt[-1]], []
    for _ in range(new_tokens):
        start = time.perf_counter()
        tokens.append(step(call, cache, tokens[-1]))
        seconds.append(time.perf_counter() - start)
    return tokens[1:], statistics.median(seconds)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that still have memory, and of their packed forms; tied weights count once."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
    floats = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    packed = sum(form.nbytes for tensor in tensors for _, form in STORE.packed_forms(tensor))
    return sum(floats.values()) + packed


@torch.no_grad()
def measure(model: PreTrainedModel, inputs: Inputs, variant: str, whole: bool = False, say: Say = lambda phase: None) -> Row:
    """Measure ``model``, which keeps no float weights afterwards where ``variant`` packs them."""
    begin = time.perf_counter()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    start_bytes = reset_peak()
    call = compiled(model, variant, whole)
    say("first call")
    _, first_call = timed(call, input_ids=torch.tensor([inputs.text[: inputs.window]]), use_cache=False)
    say("perplexity")
    value, window_seconds = perplexity(call, inputs)
    say("first decode step")
    cache = empty_cache(model, len(inputs.prompt) + inputs.new_tokens)
    _, first_decode = timed(step, call, cache, inputs.prompt[0])
    peak_bytes = status("VmHWM")
    reset_peak()
    say("decoding")
    generated, step_seconds = decode(call, cache, inputs.prompt[1:], inputs.new_tokens)
    decode_bytes = status("VmHWM")
    return Row(
        variant, parameters, weight_bytes(model), start_bytes, max(peak_bytes, decode_bytes), decode_bytes, value,
        1 / step_seconds, first_call, first_decode, window_seconds, generated, time.perf_counter() - begin,
    )  # fmt: skip


def timed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """The result of a call and its seconds."""
    start = time.perf_counter()
    return function(*args, **kwargs), time.perf_counter() - start


def status(field: str) -> int:
    """A size in bytes from ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(field)


def cpu_name() -> str:
    """That of this machine's processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def reset_peak() -> int:
    """Begin ``VmHWM`` anew, at the resident memory of now, which is returned. Where that is not allowed the older peak stays."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def main(folder: Path, variant: str, whole: bool) -> None:
    begin = time.perf_counter()
    smollm2.silence()
    _tell(phase="loading")
    model, inputs = smollm2.load(folder)
    row = measure(model, inputs, variant, whole, lambda phase: _tell(phase=phase))
    _tell(row=asdict(row) | {"total": time.perf_counter() - begin})


def _tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "whole" in sys.argv[3:])
