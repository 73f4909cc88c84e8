"""What torch computes by one call, a layer of ``nn.TransformerEncoder`` in eval mode, written out so that its products are seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kbit_inductor.capture import Context
from kbit_inductor.passes.values import infer_values

ENCODER_LAYER = "_transformer_encoder_layer_fwd"
KEY_PADDING = 1  # a mask [B, L]; others are [L, L] or [B, H, L, L]


def write_out(gm: fx.GraphModule, context: Context) -> None:
    """Replace each such call that takes a weight to pack, and count them."""
    tracer = fx.proxy.GraphAppendingTracer(context.graph)
    for node in list(context.graph.nodes):
        if getattr(node.target, "__name__", "") != ENCODER_LAYER:
            continue
        if not any(context.weight_of(operand) is not None for operand in node.all_input_nodes):
            continue
        proxies: Any = {operand: fx.Proxy(operand, tracer) for operand in node.all_input_nodes}
        with context.graph.inserting_before(node):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), proxies.__getitem__)
            result: Any = encoder_layer(*args, **kwargs)
        node.replace_all_uses_with(result.node)
        context.graph.erase_node(node)
        infer_values(gm, context)
        context.fusions["written out"] += 1


def encoder_layer(
    x: Tensor, embed_dim: int, num_heads: int, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor,
    use_gelu: bool, norm_first: bool, eps: float, norm1_weight: Tensor, norm1_bias: Tensor, norm2_weight: Tensor,
    norm2_bias: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """The layer as ``nn.TransformerEncoderLayer`` defines it, of x ``[B, L, E]``. What is true in ``mask`` is not attended to."""

    def norm1(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), norm2_weight, norm2_bias, eps)

    def attend(x: Tensor) -> Tensor:
        projected = functional.linear(x, in_weight, in_bias).unflatten(-1, (3, num_heads, -1))
        q, k, v = (projected.select(2, part).transpose(1, 2) for part in range(3))
        kept = None if mask is None else torch.logical_not(mask)
        kept = kept.unflatten(0, (-1, 1, 1)) if kept is not None and mask_type == KEY_PADDING else kept
        attended = functional.scaled_dot_product_attention(q, k, v, kept)
        return functional.linear(attended.transpose(1, 2).flatten(-2), out_weight, out_bias)

    def feed(x: Tensor) -> Tensor:
        hidden = functional.linear(x, weight1, bias1)
        return functional.linear(functional.gelu(hidden) if use_gelu else functional.relu(hidden), weight2, bias2)

    if norm_first:
        x = x + attend(norm1(x))
        return x + feed(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + feed(x))
