"""Who takes part: ways to turn an ``nn.Linear`` on the GPU into a module that computes it from a weight of few bits.

Peers are used as their own documentation shows it. One that does not import, or does not take a layer, is a row with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

GROUP = 128
Convert = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer.

    Attributes:
        name: as the tables show it.
        bits: of a code, without scales.
        dtype: of the float layer that is converted, and so of the activations.
        convert: the layer in a form of its own. The layer may be used up.
    """

    name: str
    bits: int
    dtype: torch.dtype
    convert: Convert

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.name.startswith("kbit")


def floats(dtype: torch.dtype = torch.float16) -> Contender:
    """cuBLAS on the weight as it is."""
    return Contender(f"cuBLAS {str(dtype).removeprefix('torch.')}", 16, dtype, lambda linear: linear)


def ours(bits: int) -> Contender:
    """The packed module of this project. Rounded to nearest: no time depends on how codes were chosen."""
    return Contender(f"kbit {bits}", bits, torch.float16, partial(_kbit, bits))


def peers() -> list[Contender]:
    """Other libraries, each in the dtype that its kernels are made for."""
    half, brain = torch.float16, torch.bfloat16
    return [
        *(Contender(f"gemlite {bits}", bits, half, partial(_gemlite, bits)) for bits in (8, 4, 2)),
        Contender("torchao int4", 4, brain, _torchao_int4),
        Contender("torchao int8", 8, brain, _torchao_int8),
        Contender("bitsandbytes nf4", 4, half, _bitsandbytes),
        *(Contender(f"HQQ {bits}", bits, half, partial(_hqq, bits)) for bits in (8, 4, 3, 2)),
    ]


def _kbit(bits: int, linear: nn.Linear) -> nn.Module:
    import kbit_inductor as kbit

    options = {"bits": bits, "group_size": GROUP, "quantizer": "rtn", "min_elements": 0}
    (packed,) = kbit.quantize_(nn.Sequential(linear), options)
    return packed


def _hqq_layer(bits: int, linear: nn.Linear) -> nn.Module:
    _needs_gpu(linear)
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    return HQQLinear(linear, quant_config=config, compute_dtype=linear.weight.dtype, device=str(linear.weight.device))


def _hqq(bits: int, linear: nn.Linear) -> nn.Module:
    return _hqq_layer(bits, linear)


def _gemlite(bits: int, linear: nn.Linear) -> nn.Module:
    """Its quantizer is HQQ's."""
    _needs_gpu(linear)
    from gemlite.helper import A16Wn

    packed: nn.Module = A16Wn(device=str(linear.weight.device)).from_hqqlinear(_hqq_layer(bits, linear))
    return packed


def _torchao_int4(linear: nn.Linear) -> nn.Module:
    _needs_gpu(linear)
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
    return model[0]


def _torchao_int8(linear: nn.Linear) -> nn.Module:
    _needs_gpu(linear)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    _needs_gpu(linear)
    import bitsandbytes

    weight, dtype = linear.weight, linear.weight.dtype
    packed = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], linear.bias is not None, compute_dtype=dtype, quant_type="nf4"
    )
    packed.weight = bitsandbytes.nn.Params4bit(weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    packed.bias = linear.bias
    moved: nn.Module = packed.to(weight.device)  # quantizes
    return moved


def _needs_gpu(linear: nn.Linear) -> None:
    if linear.weight.device.type != "cuda":
        raise NotImplementedError("its kernels need a GPU")
