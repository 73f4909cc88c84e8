"""Other libraries' ways to compute a layer: torch, its int4 and int8 kernels, ONNX Runtime, llama.cpp."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cpu import ggml
from cpu.contender import Contender, Copy
from cpu.timing import Call

GROUP = 128
CopyMaker = Callable[[], Copy]


def contenders() -> list[Contender]:
    """All peers, floats first."""
    return [
        Contender("torch fp32", 32, partial(_float, torch.float32), "torch"),
        Contender("torch bf16", 16, partial(_float, torch.bfloat16), "torch"),
        Contender("torch int4", 4, _int4, "torch int4"),
        Contender("oneDNN int8", 8, partial(_dynamic_int8, "onednn"), "torch int8"),
        Contender("fbgemm int8", 8, partial(_dynamic_int8, "fbgemm"), "torch int8"),
        *(Contender(f"ONNX Runtime {bits}", bits, partial(_onnx, bits), "ONNX Runtime") for bits in (8, 4, 2)),
        *(Contender(f"llama.cpp {kind}", bits, partial(ggml.load, kind), "llama.cpp") for kind, (_, bits) in ggml.TYPES.items()),
    ]


def _float(dtype: torch.dtype, weight: Tensor) -> CopyMaker:
    def copy() -> Copy:
        own = weight.to(dtype, copy=True)
        return Copy(own.nbytes, lambda x: partial(functional.linear, x.to(dtype), own))

    return copy


def _int4(weight: Tensor) -> CopyMaker:
    """``_weight_int4pack_mm_for_cpu``: codes 0 to 15 in groups, ``w = (code - 8) · scale + zero``, bfloat16 activations."""
    if weight.size(1) % GROUP:
        raise NotImplementedError(f"{weight.size(1)} columns are no multiple of its groups of {GROUP}")
    grouped = weight.view(weight.size(0), -1, GROUP)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 15
    codes = ((grouped - low) / scale).round().to(torch.int32).view_as(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    grid = torch.cat([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous().bfloat16()  # [K / group, N, 2]

    def copy() -> Copy:
        own, own_grid = packed.clone(), grid.clone()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        return Copy(own.nbytes + own_grid.nbytes, lambda x: partial(product, x.bfloat16(), own, GROUP, own_grid))

    return copy


def _dynamic_int8(engine: str, weight: Tensor) -> CopyMaker:
    """``quantized::linear_dynamic``: a scale for each row of W, x quantized to uint8 as a whole in each call."""
    scales = weight.abs().amax(dim=1).double() / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized dtypes are deprecated
        quantized = torch.quantize_per_channel(weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8)

    def copy() -> Copy:
        with _quantized_engine(engine):
            packed = torch.ops.quantized.linear_prepack(quantized, None)
        # x in 7 bits, as torch.ao.nn.quantized.dynamic.Linear has it: without VNNI, pairs of products are added in 16 bits.
        return Copy(weight.numel() + 4 * len(scales), lambda x: partial(torch.ops.quantized.linear_dynamic, x, packed, True))

    return copy


@contextlib.contextmanager
def _quantized_engine(name: str) -> Iterator[None]:
    """The library that ``linear_prepack`` packs for; the product is then computed by the same."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    yield
    torch.backends.quantized.engine = before


def _onnx(bits: int, weight: Tensor) -> CopyMaker:
    """``MatMulNBits`` on groups with a scale around the middle code, int8 activations (``accuracy_level=4``)."""
    from cpu.onnx_session import session

    model, nbytes = _matmul_nbits(bits, weight)
    rows = weight.size(0)

    def copy() -> Copy:
        own = session(model)
        return Copy(nbytes, lambda x: _bind_session(own, x, rows))

    return copy


def _matmul_nbits(bits: int, weight: Tensor) -> tuple[bytes, int]:
    """A model of one ``MatMulNBits``, and the bytes of its codes and scales."""
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    grouped = functional.pad(weight, (0, -columns % GROUP)).view(rows, -1, GROUP)
    middle = 2 ** (bits - 1)
    scale = grouped.abs().amax(dim=-1, keepdim=True) / (middle - 0.5)
    codes = ((grouped / scale).round() + middle).clamp(0, 2**bits - 1).to(torch.uint8)
    digits = codes.view(rows, -1, GROUP * bits // 8, 8 // bits)  # the codes of one byte, the first in its lowest bits
    packed = (digits << (bits * torch.arange(8 // bits)).to(torch.uint8)).sum(dim=-1, dtype=torch.uint8)
    arrays = {"codes": packed.numpy(), "scales": scale.flatten().numpy()}
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=GROUP, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", rows])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString(), sum(array.nbytes for array in arrays.values())


def _bind_session(session: Any, x: Tensor, rows: int) -> Call:
    """A run of ``session`` from ``x`` to an array, both where they are, without copies."""
    inputs, y = x.numpy(), np.empty((x.size(0), rows), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("x", inputs)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def call() -> np.ndarray:
        session.run_with_iobinding(binding)
        return y

    return call
