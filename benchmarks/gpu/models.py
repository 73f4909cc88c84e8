"""Whole models: a token for 1, 8 and 32 rows, a prompt of 2048 tokens, and memory, at several bits, beside float16 and others."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import measure
import smollm2
import torch

from gpu import llama
from gpu.contenders import GROUP, Contender, peers
from gpu.machine import Ceilings, allocated
from gpu.session import Row, Session

BITS = (4, 2, 3, 8)
BATCHES = (1, 8, 32)
PAST, PROMPT = 128, 2048
PEERS = ("gemlite 4", "torchao int4", "bitsandbytes nf4", "HQQ 4")
SMOLLM2 = "SmolLM2-135M-Instruct"
MODELS = ("Llama 8B", SMOLLM2, "Llama 1B")
Prepare = Callable[[Any], None]


def measure_all(session: Session, ceilings: Ceilings) -> None:
    """Rows of all models, the most important first."""
    for name in ("tiny",) if session.rehearsal else MODELS:
        for variant, bits, dtype, prepare in variants(session.rehearsal):
            what: Row = {"model": name, "contender": variant, "bits": bits}
            with session.row(what) as there_is_time:
                if there_is_time:
                    session.say(f"{name}: {variant}")
                    session.add(what | _figures(session, name, dtype, prepare, ceilings))
            _forget()


def variants(rehearsal: bool) -> Iterator[tuple[str, int, torch.dtype, Prepare]]:
    """Name, bits, dtype, and what is done to a float model."""
    half = torch.float32 if rehearsal else torch.float16  # the CPU of a rehearsal has no fast float16
    yield "kbit 4", 4, half, _packed(4)
    yield "torch.compile", 16, half, llama.compile_parts
    if not rehearsal:
        yield "torch.compile bfloat16", 16, torch.bfloat16, llama.compile_parts
        for bits in BITS[1:]:
            yield f"kbit {bits}", bits, half, _packed(bits)
    for peer in peers():
        if peer.name in PEERS:
            yield peer.name, peer.bits, peer.dtype, _converted(peer)


def _packed(bits: int) -> Prepare:
    options = {"bits": bits, "end_bits": 1, "group_size": GROUP, "quantizer": "rtn", "release_weights": True, "min_elements": 0}
    return lambda model: llama.compile_parts(model, backend="kbit", options=options)


def _converted(peer: Contender) -> Prepare:
    def prepare(model: Any) -> None:
        for module, name, linear in llama.linears(model):
            setattr(module, name, peer.convert(linear))
        llama.compile_parts(model)

    return prepare


@torch.no_grad()
def _figures(session: Session, name: str, dtype: torch.dtype, prepare: Prepare, ceilings: Ceilings) -> Row:
    device, row = session.device, Row()
    model, inputs = _load(name, dtype, device)
    prepare(model)
    past, tokens, batches = (8, 16, (1, 2)) if session.rehearsal else (PAST, PROMPT, BATCHES)
    reset_peak(device)
    for batch in batches:
        step = llama.Decoding(model, batch, past)
        row[f"decode_{batch}_seconds"] = session.clock.seconds([step])
        if batch == 1:
            packed = measure.weight_bytes(model)
            read = packed - (0 if model.config.tie_word_embeddings else _table_bytes(model)) + step.cache_bytes
            row |= {"weight_bytes": packed, "read_bytes": read, "allocated_bytes": allocated(device)}
            row["bytes_share"] = read / ceilings.bytes_per_second / row["decode_1_seconds"]
    row[f"prefill_{tokens}_seconds"] = session.clock.seconds([llama.prompt(model, tokens)])
    row["peak_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    if inputs is not None:
        row["perplexity"] = _perplexity(model, inputs)
    return row


def _load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, smollm2.Inputs | None]:
    if name != SMOLLM2:
        return llama.random_model(name, dtype, device), None
    model, tokenizer = smollm2.read_package()
    inputs = smollm2.tokenize(tokenizer, 2048, 512, 1)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), inputs


def _table_bytes(model: Any) -> int:
    """Bytes of the embedding, of which a step reads a row."""
    from kbit_inductor.weights.store import STORE

    table = model.get_input_embeddings().weight
    return sum(packed.nbytes for _, packed in STORE.packed_forms(table)) or int(table.untyped_storage().nbytes())


def _perplexity(model: Any, inputs: smollm2.Inputs) -> float:
    """Over windows that do not overlap, by the model's own forward."""
    losses = []
    for window in torch.tensor(inputs.text, device=model.device).view(-1, 1, inputs.window):
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, window[0, 1:])))
    return math.exp(sum(losses) / len(losses))


def reset_peak(device: torch.device) -> None:
    """Begin to look for the most memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _forget() -> None:
    """Let go of a model and of what was compiled for it: they are held by Dynamo."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
