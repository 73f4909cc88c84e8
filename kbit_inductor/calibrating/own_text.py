"""Calibration data that a language model writes itself: its inputs are then distributed like what it was trained on.

Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models" (2023), who begin each text with a random
token; Williams et al., "Self-calibration for Language Model Quantization and Pruning" (2025), who find such data no worse than text
chosen by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.errors import InvalidOptionError, TrainingModeError


@torch.no_grad()
def own_text(model: nn.Module, count: int = 8, length: int = 512, *, seed: int = 0) -> Tensor:
    """Token ids, int64 ``[count, length]``, that ``model`` draws one after the other, for :func:`kbit_inductor.calibrate`.

    Each text begins with a token drawn at random, and goes on as the model predicts, at temperature 1, never ending early. A model
    of few positions gets shorter ones. All texts are written together, so a cache of ``count * length`` tokens must fit.

    Args:
        model: a causal language model of transformers on float weights, in ``eval()``.
        count: of texts, at least 1.
        length: of each, at least 2.
        seed: other texts for another one. The random state of the process stays as it is.

    Raises:
        InvalidOptionError: a ``count`` or ``length`` below that.
        NotACausalLMError: a model that does not continue a text.
        TrainingModeError: a model in training mode.
    """
    from kbit_inductor import huggingface  # transformers is no requirement of this package, and takes seconds to import

    if count < 1 or length < 2:
        raise InvalidOptionError(f"count is {count} and length {length}; give at least 1 text of at least 2 tokens")
    huggingface.check_writes_text(model)
    if model.training:
        raise TrainingModeError("the model is in training mode, where dropout changes what it writes; call model.eval()")
    writer: Any = model
    sizes = huggingface.text_config(model)
    length = min(length, getattr(sizes, "max_position_embeddings", length))
    device = writer.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = torch.randint(sizes.vocab_size, (count, 1), device=device)
        more: dict[str, Any] = {"min_new_tokens": length - 1, "max_new_tokens": length - 1, "do_sample": True, "pad_token_id": 0}
        found: Tensor = writer.generate(first, attention_mask=torch.ones_like(first), temperature=1.0, top_k=0, top_p=1.0, **more)
    return found
