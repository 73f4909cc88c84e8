"""Rows of other libraries' models: torchvision, timm, diffusers. Each is skipped where its library is not installed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from breadth.architectures import BATCH, TOKENS, Layers
from torch import nn

# What torchvision registers fakes for when it is imported.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@dataclass(frozen=True)
class Peer(Layers):
    """One row of a model of the library ``kind``."""

    @property
    def source(self) -> str:
        """The library and its version."""
        return f"{self.kind} {importlib.metadata.version(self.kind)}"

    @property
    def missing(self) -> str:
        """Why it cannot be measured here, or ""."""
        return "" if importlib.util.find_spec(self.kind) else f"{self.kind} is not installed"


@functools.cache
def complete_torchvision() -> None:
    """Let torchvision be imported where its compiled part does not load: that of its CUDA wheel beside a CPU build of torch.

    Its models need none of it; but the import wants to know two of its operators.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    with contextlib.suppress(RuntimeError):
        importlib.import_module("torchvision")
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    for operator in OPERATORS:
        torch.library.define(f"torchvision::{operator.split('(')[0]}", operator[operator.index("(") :])


def _of(library: str, path: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """Makes what ``library.path`` makes."""

    def make() -> nn.Module:
        *modules, name = path.split(".")
        return getattr(importlib.import_module(".".join([library, *modules])), name)(*args, **kwargs)  # type: ignore[no-any-return]

    return make


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(96, 192, 1), CNBlockConfig(192, None, 1)], num_classes=5)  # type: ignore[no-any-return]


def images(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.randn(BATCH, 3, size, size)}


def _sample(channels: int, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"sample": torch.randn(BATCH, channels, 8, 8), **more, "return_dict": False}


def _conditioned() -> dict[str, Any]:
    states = torch.randn(BATCH, TOKENS, 32)
    return {"sample": torch.randn(BATCH, 4, 8, 8), "timestep": 7, "encoder_hidden_states": states, "return_dict": False}


def _labelled() -> dict[str, Any]:
    x, steps, labels = torch.randn(BATCH, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 2])
    return {"hidden_states": x, "timestep": steps, "class_labels": labels, "return_dict": False}


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_of("torchvision.models", "resnet18", num_classes=5), 64),
    "densenet": (_of("torchvision.models", "DenseNet", 8, (2, 2, 2), 16, num_classes=5), 64),
    "squeezenet1_1": (_of("torchvision.models", "squeezenet1_1", num_classes=5), 64),
    "googlenet": (_of("torchvision.models", "googlenet", num_classes=5, aux_logits=False, init_weights=False), 64),
    "shufflenet_v2": (_of("torchvision.models", "shufflenet_v2_x0_5", num_classes=5), 64),
    "mobilenet_v3_small": (_of("torchvision.models", "mobilenet_v3_small", num_classes=5), 64),
    "regnet_y_400mf": (_of("torchvision.models", "regnet_y_400mf", num_classes=5), 64),
    "vit": (_of("torchvision.models", "VisionTransformer", 32, 8, 1, 4, 64, 96, num_classes=5), 32),
    "swin": (_of("torchvision.models", "SwinTransformer", [4, 4], 16, [1, 1], [2, 4], [2, 2], num_classes=5), 32),
    "convnext": (_convnext, 32),
}
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 4, "num_classes": 5}
STAGES: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [32, 48, 64, 96], "stem_chs": 16, "num_classes": 5}
TIMM: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit_tiny": (_of("timm", "create_model", "vit_tiny_patch16_224", **SMALL), 32),
    "deit_tiny_distilled": (_of("timm", "create_model", "deit_tiny_distilled_patch16_224", **SMALL), 32),
    "eva02_tiny": (_of("timm", "create_model", "eva02_tiny_patch14_224", **SMALL, head_init_scale=1.0), 32),
    "xcit_nano": (_of("timm", "create_model", "xcit_nano_12_p16_224", **{**SMALL, "patch_size": 16}), 32),
    "mixer": (_of("timm.models.mlp_mixer", "MlpMixer", 5, 32, patch_size=8, num_blocks=1, embed_dim=64), 32),
    "resnetv2": (_of("timm", "create_model", "resnetv2_50", **STAGES), 64),
    "ghostnet_050": (_of("timm", "create_model", "ghostnet_050", num_classes=5), 64),
    "edgenext_xx_small": (_of("timm", "create_model", "edgenext_xx_small", num_classes=5), 64),
    "fastvit_t8": (_of("timm", "create_model", "fastvit_t8", num_classes=5), 64),
    "nf_resnet26": (_of("timm", "create_model", "nf_resnet26", num_classes=5), 64),
}
DIFFUSERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "UNet2DConditionModel": (
        _of(
            "diffusers", "UNet2DConditionModel", sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32, attention_head_dim=8,
        ),
        _conditioned,
    ),
    "DiTTransformer2DModel": (
        _of(
            "diffusers", "DiTTransformer2DModel", num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=1,
            sample_size=8, norm_num_groups=8, num_embeds_ada_norm=10,
        ),
        _labelled,
    ),
    "AutoencoderKL": (
        _of(
            "diffusers", "AutoencoderKL", block_out_channels=(16, 32), norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        _sample(3),
    ),
    "UNet2DModel": (
        _of(
            "diffusers", "UNet2DModel", sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        ),
        _sample(3, timestep=7),
    ),
}  # fmt: skip


def peers() -> list[Peer]:
    """All rows, in the order of the table."""
    complete_torchvision()
    rows = []
    for library, models in (("torchvision", TORCHVISION), ("timm", TIMM)):
        rows += [Peer(f"{library} {name}", library, inputs=images(size), make=make) for name, (make, size) in models.items()]
    return rows + [Peer(name, "diffusers", inputs=inputs, make=make) for name, (make, inputs) in DIFFUSERS.items()]
