"""Greedy generation by a transformers model with a static cache: the loop that torch's own rows run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

SHORT = 64  # prompts up to this length go in token by token, so that no graph is compiled for their length


class Greedy:
    """Greedy generation by ``call``, ``model`` itself or a compiled form of it, with a cache of ``length`` tokens."""

    def __init__(self, model: PreTrainedModel, call: Callable[..., Any], length: int) -> None:
        config = model.config
        self.call = call
        self.cache = StaticCache(config=config, max_cache_len=length)
        # Made inside of a first call, the tensors would cost a second compilation.
        size = config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(1, config.num_key_value_heads, size, model.dtype, torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, tokens: list[int], new: int) -> list[int]:
        """``new`` tokens after ``tokens``, whatever they are."""
        self.cache.reset()
        pieces = [[token] for token in tokens] if len(tokens) <= SHORT else [tokens]
        for piece in pieces:
            best = self._step(piece)
        generated = [best]
        while len(generated) < new:
            generated.append(self._step(generated[-1:]))
        return generated

    def _step(self, tokens: list[int]) -> int:
        output = self.call(input_ids=torch.tensor([tokens]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())
