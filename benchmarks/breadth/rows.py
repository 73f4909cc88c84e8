"""The rows of the table: which architectures, and what their configurations need beyond the common sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from breadth.architectures import BATCH, TOKENS, Architecture, Layers, both, decoding, pixels, sequences, text, video, wave
from breadth.peers import peers
from torch import nn

CAUSAL, BACKBONE = "AutoModelForCausalLM", "AutoBackbone"
FOUR: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}
# Wide enough for the few terms of a depthwise convolution to weigh as little as they do in models of a usual size.
WIDE: dict[str, Any] = {"hidden_size": 256}
STAGES: dict[str, Any] = {
    "stem_channels": [3, 8, 12], "stage_in_channels": [12, 16, 24, 32], "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": [16, 24, 32, 48], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2],
}  # fmt: skip
LEFT: dict[str, Any] = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [96, 192, 384, 768], "patch_size": 4, "num_hidden_layers": ...
}  # fmt: skip
# As wide as the architecture is, for a depthwise convolution to weigh as little as it does there.
OWN: dict[str, Any] = {"depths": [1, 1, 1, 1], "num_attention_heads": ..., "hidden_size": ..., "num_hidden_layers": ...}
FULL: dict[str, Any] = {"hidden_size": ..., "intermediate_size": ..., "num_attention_heads": ...}
WAVE: dict[str, Any] = {
    "conv_dim": [32, 32], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
}  # fmt: skip
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4}
TOWERS: dict[str, Any] = {"text_config": {}, "vision_config": {}}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "gemma2": {}, "gemma3_text": {}, "phi": {}, "phi3": {},
    "gpt2": {}, "gpt_neox": {}, "opt": {}, "bloom": {}, "mpt": {},
    "gpt_neo": {"attention_types": [[["global"], 1]]}, "falcon": {},
    "olmo2": {}, "cohere": {}, "granite": {},

}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {}, "qwen2_moe": {"shared_expert_intermediate_size": 48}, "qwen3_moe": {}, "olmoe": {}, "granitemoe": {},
    "phimoe": {}, "gpt_oss": {}, "glm4_moe": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
    },
}  # fmt: skip
STATES: dict[str, dict[str, Any]] = {
    "mamba": WIDE, "falcon_mamba": WIDE, "recurrent_gemma": WIDE, "jamba": WIDE, "bamba": WIDE, "lfm2": {},
    "mamba2": {**WIDE, "num_heads": 8, "head_dim": 64, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 64, "num_hidden_layers": 2},
    "qwen3_next": {**WIDE, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "shared_expert_intermediate_size": 48},
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {}, "roberta": {}, "distilbert": {"dim": 64, "hidden_dim": 96}, "albert": {}, "electra": {}, "deberta": {},
    "deberta-v2": {}, "modernbert": {}, "squeezebert": {}, "convbert": WIDE, "mobilebert": {"true_hidden_size": 32,
    "intra_bottleneck_size": 32}, "fnet": {}, "nystromformer": FULL, "roformer": {}, "xlm": {"emb_dim": 64}, "rembert": {},
    "xlnet": {"max_position_embeddings": ..., "d_inner": 96}, "esm": {"mask_token_id": 3, "vocab_size": 160},
}  # fmt: skip
PAIRS: dict[str, dict[str, Any]] = {
    "t5": {}, "bart": {}, "switch_transformers": {}, "m2m_100": {},
    "longt5": {}, "nllb-moe": {}, "prophetnet": {"num_hidden_layers": ..., "num_encoder_layers": 1},
}  # fmt: skip
SOUND: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    **dict.fromkeys(("wav2vec2", "hubert", "wavlm", "sew"), (WAVE, wave)),
    "wav2vec2-conformer": ({**WAVE, **FULL}, wave),
}
IMAGES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    name: (config, pixels)
    for name, config in {
        "vit": {}, "beit": {}, "dinov2": {}, "dinov3_vit": {},
        "vit_mae": {}, "siglip_vision_model": {}, "clip_vision_model": {}, "aimv2_vision_model": {},
        "vitdet": {}, "dpt": {}, "yolos": {"num_detection_tokens": 4},
        "sam_vision_model": {"mlp_dim": 96, "output_channels": 16, "window_size": 2, "global_attn_indexes": [0]},
        "swin": SWIN, "swinv2": {**SWIN, "pretrained_window_sizes": [0, 0]}, "maskformer-swin": SWIN,
        "swin2sr": {**SWIN, "patch_size": 1, "embed_dim": 16},
        "convnext": LEFT, "convnextv2": LEFT, "dinov3_convnext": LEFT, "poolformer": FOUR, "regnet": {**FOUR, "groups_width": 8},
        "resnet": {**FOUR, "embedding_size": 16}, "bit": {**FOUR, "embedding_size": 16, "num_groups": 8},
        "hgnet_v2": STAGES, "textnet": {},
        "efficientnet": {"initializer_range": 0.3, "depth_coefficient": 0.1}, "mobilenet_v1": {}, "mobilenet_v2": {},
        "focalnet": {"embed_dim": 16, "depths": [1, 1, 1, 1]},
        "mobilevit": {"initializer_range": 0.3, "hidden_sizes": [32, 32, 32], "neck_hidden_sizes": [8, 16, 16, 16, 16, 16, 32]},
        "cvt": {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 3]},
        "pvt": {**FOUR, "num_attention_heads": [1, 1, 2, 4], "sequence_reduction_ratios": [4, 2, 1, 1]},
        "pvt_v2": OWN, "segformer": OWN, "glpn": OWN, "swiftformer": {"depths": [1, 1, 1, 1],
        "embed_dims": [16, 24, 32, 48]},
    }.items()
}  # fmt: skip
IMAGES |= {
    "levit": ({"hidden_sizes": [32, 48, 64], "depths": [1, 1, 1], "image_size": 64, "patch_size": 16}, lambda: pixels(64)),
    "hiera": ({"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}, lambda: pixels(64)),
    "mobilevitv2": ({"n_attn_blocks": [1, 1, 1], "patch_size": 2}, lambda: pixels(64)),
    "timesformer": ({"num_frames": 4}, video), "vivit": ({"num_frames": 4, "tubelet_size": [2, 8, 8]}, video),
    "videomae": ({"num_frames": 4}, video),
}  # fmt: skip
MULTIMODAL: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    **dict.fromkeys(("clip", "siglip", "owlvit", "groupvit", "aimv2"), (TOWERS, both)),
    "vilt": ({}, both), "git": ({"vision_config": {}}, lambda: {**both(), "use_cache": False}),
}  # fmt: skip
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "nn.Transformer": (
        lambda: nn.Transformer(64, 4, 2, 2, 96, batch_first=True),
        lambda: {"src": torch.randn(BATCH, TOKENS, 64), "tgt": torch.randn(BATCH, 7, 64)},
    ),
    "nn.LSTMCell": (lambda: nn.LSTMCell(64, 96), lambda: {"input": torch.randn(BATCH, 64)}),
    "nn.GRUCell": (lambda: nn.GRUCell(64, 96), lambda: {"input": torch.randn(BATCH, 64)}),
}


def architectures() -> list[Architecture]:
    """All rows, in the order of the table."""
    rows = [Architecture(name, "decoder", config, decoding, CAUSAL) for name, config in DENSE.items()]
    rows += [Architecture(name, "mixture", config, decoding, CAUSAL) for name, config in MIXTURES.items()]
    rows += [Architecture(name, "state space", config, decoding, CAUSAL) for name, config in STATES.items()]
    rows += [Architecture(name, "encoder", config, text) for name, config in ENCODERS.items()]
    rows += [Architecture(name, "encoder–decoder", config, sequences) for name, config in PAIRS.items()]
    for kind, table in (("audio", SOUND), ("multimodal", MULTIMODAL), ("vision", IMAGES)):
        rows += [Architecture(name, kind, config, inputs) for name, (config, inputs) in table.items()]
    rows += [Layers(name, "layers", inputs=inputs, make=make) for name, (make, inputs) in LAYERS.items()]
    return [*rows, *peers()]
