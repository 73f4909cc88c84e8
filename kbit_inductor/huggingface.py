"""What a causal language model of transformers is given so that a step touches no more of the cache than it needs; and how a
model of transformers is described and built again.

The cache is static: tensors of a fixed length, written in place. But a step reads only the part that is filled, a view whose size
is a symbol in the graph. So attention needs no mask where nothing is padded, and its cost grows with the text, not with the cache.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kbit_inductor.errors import ModelMismatchError, NotACausalLMError, UncapturableModelError
from kbit_inductor.models.damage import PARSING_ERRORS, check_sizes

NAME = "kbit_generator"  # of the attention below, in transformers' tables
CONFIGURATION_ERRORS = (StrictDataclassError, *PARSING_ERRORS)
"""What transformers raises for a configuration that is damaged: the first is no ValueError."""
Buffers = list[tuple[Tensor, Tensor]]


class Slots(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, filled up to ``start``: what follows is written there, and only what is filled is read."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, start: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.start = start
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[batch, heads, new, size]`` states; returns those of all tokens until now."""
        end = self.start + key_states.shape[2]
        self.keys[:, :, self.start : end] = key_states
        self.values[:, :, self.start : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the tensors are there from the start."""

    def get_seq_length(self) -> int:
        """How many tokens are filled."""
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys ``query_length`` new tokens will see, and the position of the first."""
        return self.start + query_length, 0

    def get_max_length(self) -> int:
        """How many tokens there is room for."""
        return self.keys.shape[2]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``[batch, heads, new, size]`` queries, as transformers calls it.

    For a single token keys are not repeated for the heads that share them.
    """
    special = any(options.get(name) is not None for name in ("softcap", "position_bias"))
    if query.shape[2] > 1 or special:
        done: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return done
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=options.get("scaling"), enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2), None


def mask(**options: Any) -> Tensor | None:
    """The mask of :func:`attention`, or None where it is nothing but causal, so that all that is filled is attended to."""
    if options.get("attention_mask") is None and options["mask_function"] is causal_mask_function:
        return None
    made: Tensor | None = sdpa_mask(**options | {"allow_is_causal_skip": False})
    return made


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` use :func:`attention`."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check(model: Any) -> None:
    """Raise NotACausalLMError where ``model`` writes no text, UncapturableModelError where it does in a way of its own."""
    check_writes_text(model)
    if not model._supports_sdpa:
        raise UncapturableModelError(
            f"{type(model).__name__} has an attention of its own, without torch's SDPA; use model.generate"
        )


def check_writes_text(model: Any) -> None:
    """Raise NotACausalLMError where ``model`` does not continue a text."""
    what = "give a causal language model of transformers, as AutoModelForCausalLM.from_pretrained(…) returns"
    if not isinstance(model, PreTrainedModel):
        raise NotACausalLMError(f"the model is a {type(model).__name__}; {what}")
    if model.config.is_encoder_decoder:
        raise NotACausalLMError(f"{type(model).__name__} has an encoder, so it does not continue a prompt; {what}")
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise NotACausalLMError(f"{type(model).__name__} has no head that predicts tokens; {what}")


def text_config(model: Any) -> Any:
    """The sizes of ``model``, or of its part that writes text."""
    return model.config.get_text_config(decoder=True)


def empty_cache(model: PreTrainedModel, batch: int, length: int) -> Buffers:
    """Keys and values of each layer, ``[batch, key heads, length, head size]`` in the model's dtype."""
    config = text_config(model)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = (batch, getattr(config, "num_key_value_heads", None) or heads, length, size)
    zeros = functools.partial(torch.zeros, shape, dtype=model.dtype, device=model.device)
    return [(zeros(), zeros()) for _ in range(config.num_hidden_layers)]


def cache_argument(model: PreTrainedModel) -> str:
    """What this release of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def last_logits(
    model: PreTrainedModel, buffers: Buffers, cache: str, ids: Tensor, padding: Tensor, start: int, count: int = 1
) -> Tensor:
    """The logits ``[batch, count, vocabulary]`` that follow the last of ``[batch, new]`` tokens ``ids``, which begin at ``start``.

    ``padding``, ``[batch]``, is how many tokens at the left of each row are none. A single row has none.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None] + start
    unpadded = None
    if ids.shape[0] > 1:
        positions = (positions - padding[:, None]).clamp(min=0)
        unpadded = torch.arange(start + ids.shape[1], device=ids.device)[None] >= padding[:, None]
    elif count > 1:  # which of several tokens sees which is more than that all see what is filled
        unpadded = torch.ones(1, start + ids.shape[1], dtype=torch.bool, device=ids.device)
    layers = Cache(layers=[Slots(keys, values, start) for keys, values in buffers])
    output = model(
        input_ids=ids, attention_mask=unpadded, position_ids=positions, use_cache=True, logits_to_keep=count, **{cache: layers}
    )
    logits: Tensor = output.logits[:, -count:]
    return logits


def description(model: nn.Module) -> dict[str, Any] | None:
    """Class and configuration of ``model`` as JSON, for :func:`build`; None where it is no model of transformers itself."""
    kind = type(model)
    if not isinstance(model, PreTrainedModel) or getattr(transformers, kind.__name__, None) is not kind:
        return None
    generation = getattr(model, "generation_config", None)
    return {
        "class": kind.__name__,
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "generation": None if generation is None else json.loads(generation.to_json_string(use_diff=False)),
    }


def build(described: Mapping[str, Any]) -> nn.Module:
    """The model that :func:`description` describes, on the meta device, in evaluation mode. Only a class of transformers is taken.

    Raises:
        ModelMismatchError: this release of transformers has no such class, or does not take the configuration.
    """
    name = described.get("class")
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel) or kind.config_class is None:
        raise ModelMismatchError(
            f"transformers {transformers.__version__} has no model {name!r}; give load() a function that makes it"
        )
    try:
        config = kind.config_class.from_dict(described["config"])
        with torch.device("meta"):
            model = kind(config)
        if described["generation"] is not None:
            model.generation_config = GenerationConfig.from_dict(described["generation"])
    except CONFIGURATION_ERRORS as error:
        raise ModelMismatchError(
            f"transformers {transformers.__version__} does not make a {name} of the configuration that was saved ({error}); "
            "give load() a function that makes it"
        ) from error
    return cast("nn.Module", model.eval())  # type: ignore[no-untyped-call]


def checkpoint_skeleton(folder: Path, tensors: int, nbytes: int) -> nn.Module:
    """The causal language model that ``config.json`` in ``folder`` describes, in evaluation mode: parameters on the meta device,
    buffers with values. What it says of a quantization is left out.

    Args:
        folder: with a ``config.json``.
        tensors: how many there are in its files.
        nbytes: of its files.

    Raises:
        ModelMismatchError: transformers has no such architecture, or does not take the configuration.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        vars(config).pop("quantization_config", None)
        check_sizes(config, tensors, nbytes, folder)
        model: nn.Module = without_weights(config, getattr(config, "dtype", None) or torch.float32)
    except CONFIGURATION_ERRORS as error:
        raise ModelMismatchError(f"transformers does not make a causal language model of {folder}/config.json: {error}") from error
    return model


def without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of ``config`` with parameters on the meta device, tied, and buffers with values."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    return model.eval().requires_grad_(False)
