"""A Llama of transformers on the GPU, layer by layer: a decoding step on a static cache, and a prompt.

Embedding, layers and head are compiled each by itself, so that all layers share one graph and a model compiles in seconds. A step
reads no value back and makes no tensor on the host, so that all of it can be captured in one CUDA graph, which is what is timed:
the time of the GPU, without Python's. Where the cache stands is set at the beginning of the step, so it can be replayed for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

CONFIGS: dict[str, dict[str, int]] = {
    "Llama 8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "Llama 1B": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    },
}  # fmt: skip
"""Shapes of well-known models; their weights here are random."""


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of one of :data:`CONFIGS`, made on the device itself."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIGS[name]), dtype=dtype)
    return model.eval().requires_grad_(False)


def compile_parts(model: Any, **arguments: Any) -> None:
    """Compile embedding, layers and head each by itself."""
    for layer in model.model.layers:
        layer.compile(dynamic=False, **arguments)
    model.model.embed_tokens = torch.compile(model.model.embed_tokens, dynamic=False, **arguments)
    model.lm_head = torch.compile(model.lm_head, dynamic=False, **arguments)


def linears(model: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Every ``nn.Linear`` of the layers, with its module and its name there."""
    found = []
    for layer in model.model.layers:
        for module in layer.modules():
            found += [(module, name, child) for name, child in module.named_children() if isinstance(child, nn.Linear)]
    return found


class Decoding:
    """A step of decoding for ``batch`` rows, at position ``past`` of a cache that it makes."""

    def __init__(self, model: Any, batch: int, past: int) -> None:
        self.model, self.past = model, past
        self.cache = measure.empty_cache(model, past + 8, batch)
        self.ids = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
        self.positions = torch.full((batch, 1), past, device=model.device)
        self.mask = (torch.arange(past + 8, device=model.device) <= past).repeat(batch, 1, 1, 1)

    def __call__(self) -> Tensor:
        """The logits ``[batch, 1, vocabulary]``."""
        for layer in self.model.model.layers:
            layer.cache.layers[0].cumulative_length.fill_(self.past)
        return _forward(self.model, self.ids, self.positions, self.mask, self.cache)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, in all layers."""
        layers = [layer.cache.layers[0] for layer in self.model.model.layers]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def prompt(model: Any, tokens: int) -> Callable[[], Tensor]:
    """A call that reads a prompt and gives the logits of its last token."""
    positions = torch.arange(tokens, device=model.device)[None]
    ids = positions % model.config.vocab_size
    return lambda: _forward(model, ids, positions, None, None)


def _forward(model: Any, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    inner = model.model
    hidden = inner.embed_tokens(ids)
    angles = inner.rotary_emb(hidden, position_ids=positions)
    for layer in inner.layers:
        hidden = layer(
            hidden, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=cache is not None,
            position_embeddings=angles,
        )  # fmt: skip
    logits: Tensor = model.lm_head(inner.norm(hidden)[:, -1:])
    return logits
