"""Tiny random models of twelve transformers architectures, each with inputs for one forward pass.

Two layers each; encoder-decoders have one of each kind, since they take the longest to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 200
TOKENS = 11
BATCH = 2


def ids(batch: int = BATCH, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(4, vocabulary, (batch, tokens))


def decoder(**more: Any) -> dict[str, Any]:
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=72,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return sizes | more


def llama(**more: Any) -> nn.Module:
    config = transformers.LlamaConfig(**decoder(**more))
    return transformers.LlamaForCausalLM(config).eval()


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**decoder(tie_word_embeddings=True))).eval()


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(**decoder(query_pre_attn_scalar=12, sliding_window=8))
    return transformers.Gemma2ForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=76, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def gpt_neox() -> nn.Module:
    sizes = decoder(hidden_size=80, num_attention_heads=5)
    sizes = {k: v for k, v in sizes.items() if k not in ("num_key_value_heads", "head_dim")}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).eval()


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=68,
        word_embed_proj_dim=68,
        ffn_dim=92,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.OPTForCausalLM(config).eval()


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=66,
        intermediate_size=94,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=70,
        d_kv=14,
        d_ff=90,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=5,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=10,
        d_model=72,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=84,
        decoder_ffn_dim=84,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=78,
        intermediate_size=86,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=30,
        patch_size=10,
        num_labels=7,
    )
    return transformers.ViTForImageClassification(config).eval()


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**decoder(num_local_experts=4, num_experts_per_tok=2))
    return transformers.MixtralForCausalLM(config).eval()


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=66, state_size=8, num_hidden_layers=2, pad_token_id=0, eos_token_id=2
    )
    return transformers.MambaForCausalLM(config).eval()


def text() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def sequences() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(tokens=7), "use_cache": False}


def sound() -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 10, 32), "decoder_input_ids": ids(tokens=7), "use_cache": False}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "Llama": (llama, text),
    "Qwen3": (qwen3, text),
    "Gemma2": (gemma2, text),
    "GPT-2": (gpt2, text),
    "GPT-NeoX": (gpt_neox, text),
    "OPT": (opt, text),
    "BERT": (bert, lambda: {"input_ids": ids()}),
    "T5": (t5, sequences),
    "Whisper": (whisper, sound),
    "ViT": (vit, lambda: {"pixel_values": torch.randn(BATCH, 3, 30, 30)}),
    "Mixtral": (mixtral, text),
    "Mamba": (mamba, lambda: {"input_ids": ids(tokens=5), "use_cache": False}),  # its scan is unrolled over the tokens
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model ``name`` and its inputs, the same at every call."""
    torch.manual_seed(0)
    make_model, make_inputs = MODELS[name]
    return with_biases(make_model()), make_inputs()


def with_biases(model: nn.Module) -> nn.Module:
    """``model`` with noise on biases and norms: transformers makes them 0 and 1, and a lost one would go unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model
