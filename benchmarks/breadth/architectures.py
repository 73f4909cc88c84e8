"""Tiny random models of many architectures of transformers, each with inputs for one call.

A row of :data:`ARCHITECTURES` names transformers' model type, the kind of its inputs, and what its configuration needs beyond
:data:`SIZES`, which are given to every configuration that has an attribute of the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, TOKENS, BATCH, IMAGE, MELS = 160, 12, 2, 32, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "d_model": 64, "n_embd": 64, "embedding_size": 64, "word_embed_proj_dim": 64,
    "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96, "n_inner": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "num_hidden_layers": 1, "num_layers": 1, "n_layer": 1, "n_layers": 1, "encoder_layers": 1, "decoder_layers": 1,
    "num_decoder_layers": 1, "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16,
    "max_position_embeddings": 64, "n_positions": 64, "max_source_positions": 64, "max_target_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "image_size": IMAGE, "patch_size": 8, "num_labels": 5, "num_mel_bins": MELS, "projection_dim": 48,
    "initializer_range": 0.05,
}  # fmt: skip


def ids(tokens: int = TOKENS) -> Tensor:
    """Token numbers ``[BATCH, tokens]``, none of them special."""
    return torch.randint(4, VOCABULARY, (BATCH, tokens))


def text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def decoding() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def sequences() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(7), "use_cache": False}


def pixels(size: int = IMAGE, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, channels, size, size)}


def video() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 4, 3, IMAGE, IMAGE)}


def wave(samples: int = 1600) -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, samples)}


def both() -> dict[str, Tensor]:
    return {**text(), **pixels()}


@dataclass(frozen=True)
class Architecture:
    """One row: ``name`` is transformers' model type, ``head`` the class of automatic models that makes the model."""

    name: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Any]] = text
    head: str = "AutoModel"

    @property
    def source(self) -> str:
        """The library that the model is of, with its version; "" for the one that most are of."""
        return ""

    @property
    def missing(self) -> str:
        """Why the model cannot be made here, or ""."""
        return ""

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in ``eval`` and its inputs, the same at every call."""
        torch.manual_seed(0)
        model = getattr(transformers, self.head).from_config(configuration(self.name, self.config)).eval()
        return _with_noise(model), self.inputs()


@dataclass(frozen=True)
class Layers(Architecture):
    """One row of layers of torch.nn, which ``make`` makes."""

    make: Callable[[], nn.Module] = nn.Identity

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The layers in ``eval`` and their inputs, the same at every call."""
        torch.manual_seed(0)
        return _with_noise(self.make().eval()), self.inputs()


def configuration(name: str, more: Mapping[str, Any]) -> Any:
    """The configuration of the model type ``name`` with ``more``, and with :data:`SIZES` where it has such a number.

    What ``more`` gives as ``...`` is left as the architecture has it; a dictionary is for a configuration inside.
    """
    plain = transformers.AutoConfig.for_model(name)
    sizes = {key: value for key, value in SIZES.items() if key.endswith("_id") or _takes(plain, key)}
    given = {key: _inner(plain, key, value) if isinstance(value, dict) else value for key, value in more.items()}
    together = {key: value for key, value in {**sizes, **given}.items() if value is not ...}
    return transformers.AutoConfig.for_model(name, **together)


def _takes(config: Any, key: str) -> bool:
    """Whether ``key`` is a number in ``config`` that can be given."""
    return isinstance(getattr(config, key, None), (int, float)) and not isinstance(getattr(type(config), key, None), property)


def _inner(config: Any, key: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration ``key`` inside ``config``, as its keywords."""
    plain = getattr(config, key)
    return configuration(plain.model_type, more).to_dict() if isinstance(plain, transformers.PreTrainedConfig) else dict(more)


def _with_noise(model: nn.Module) -> nn.Module:
    """``model`` with noise on biases, norms and scales: many start as 0, 1 or 1e-6, and a lost one would go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif not parameter.any():
                parameter.normal_(std=0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model
