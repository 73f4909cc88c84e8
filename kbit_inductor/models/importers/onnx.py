"""Weights of ``MatMulNBits``, ONNX Runtime's operator for products with packed weights, as modules of a model.

Of a weight ``[N, K]`` in blocks of ``block_size`` columns an operator has ``B`` uint8 ``[N, blocks, block_size * bits / 8]``,
fields with the lowest bits first, ``scales`` ``[N, blocks]`` and zero points: none for the middle, uint8 ``[N, blocks * bits /
8]`` in fields of the same width, or floats ``[N, blocks]``. A value is ``scale * (code - zero)``. (ONNX Runtime,
``ContribOperators.md``.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor.errors import (
    CorruptModelError,
    MissingPackageError,
    ModelMismatchError,
    NotAModelFileError,
    UnsupportedFormatError,
)
from kbit_inductor.kernels.layout import MAX_BITS, group_count
from kbit_inductor.logs import logger
from kbit_inductor.models import filling
from kbit_inductor.models.damage import PARSING_ERRORS
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.importers.fields import unpack_fields

log = logger("pack")
QUANTIZED = re.compile(r"_Q\d$")  # what ONNX Runtime's quantizer adds to a name


@torch.no_grad()
def from_onnx(path: str | Path, model: Callable[[], nn.Module], *, exact: bool = True) -> nn.Module:
    """The model of ``path``, a file of ONNX, on packed modules, in evaluation mode. The package onnx must be installed.

    An operator belongs to the layer that it was exported from: its weight is called ``layer.weight_Q4``, or itself
    ``/layer/MatMul_Q4``. What else the model has is taken from the tensors of the same names.

    Args:
        path: a file, with external data beside it or not.
        model: makes the model that was exported, and is called on the meta device.
        exact: as for :func:`kbit_inductor.from_checkpoint`.

    Raises:
        NotAModelFileError: it is no file of ONNX, or damaged.
        CorruptModelError: the tensors of an operator do not fit each other.
        UnsupportedFormatError: an operator with columns in an order of its own.
        ModelMismatchError: the model is not that of the file.
        MissingPackageError: onnx is not installed.
        NonFiniteWeightError: a scale is NaN or infinite.
    """
    path = Path(path)
    graph = _opened(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    with torch.device("meta"):
        built = model().eval().requires_grad_(False)
    left = filling.awaited(built)
    rounded: dict[str, float] = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            name = _layer(node, built)
            coded = _coded(name, node, tensors)
            packed = coded.packed(name, exact=exact)
            filling.put_packed(built, f"{name}.weight", packed, coded.rows)
            rounded |= {name: packed.error} if packed.error else {}
    for name in filling.tensors(built):
        if name in tensors:
            filling.put_float(built, name, _values(tensors[name]))
    filling.finish(built, left, rounded, path)
    return built


def _opened(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingPackageError("onnx is not installed; pip install onnx") from error
    if not path.is_file():
        raise NotAModelFileError(f"{path} is no file; give a file of ONNX")
    try:
        model = onnx.load(str(path))
    except (DecodeError, onnx.checker.ValidationError, *PARSING_ERRORS) as error:
        raise NotAModelFileError(f"{path} is no file of ONNX, or is damaged ({error}); copy it anew") from error
    named = (text for item in (*model.graph.initializer, *model.graph.node) for text in (item.name, *getattr(item, "input", ())))
    if not all(isinstance(text, str) for text in named):  # protobuf gives what is no text as bytes
        raise NotAModelFileError(f"{path} is damaged: a name in it is no text; copy it anew")
    return model


def _layer(node: Any, model: nn.Module) -> str:
    """The layer of ``model`` that ``node`` was exported from."""
    names = list(_candidates(node))
    for name in names:
        try:
            if isinstance(model.get_submodule(name), nn.Linear):
                return name
        except AttributeError:
            continue
    raise ModelMismatchError(f"operator {node.name!r} belongs to no layer: there is no nn.Linear of the names {', '.join(names)}")


def _candidates(node: Any) -> Iterator[str]:
    yield QUANTIZED.sub("", node.input[1]).removesuffix(".weight")
    parts = [part for part in node.name.split("/") if part]
    yield ".".join(parts[:-1])


def _coded(name: str, node: Any, tensors: dict[str, Any]) -> CodedWeight:
    told = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, bits, block = (
        int(told.get(key, default)) for key, default in (("N", 0), ("K", 0), ("bits", 4), ("block_size", 0))
    )
    if min(rows, columns, block) < 1 or not 1 <= bits <= MAX_BITS or block * bits % 8:
        raise CorruptModelError(f"layer {name!r} is {rows} x {columns} of {bits} bits in blocks of {block}; export it anew")
    if len(node.input) > 4 and node.input[4]:
        raise UnsupportedFormatError(f"layer {name!r} has columns in an order of its own, which is not read")
    blocks, width = group_count(columns, block), block * bits // 8
    data = _input(name, node, 1, tensors, (rows, blocks * width), (torch.uint8,))
    scale = _input(name, node, 2, tensors, (rows, blocks), (torch.float32, torch.float16, torch.bfloat16))

    def codes(part: slice) -> Tensor:
        return fields(data[part], bits, blocks * block)[:, :columns]

    return CodedWeight(codes, rows, columns, bits, block, scale.double(), _zero(name, node, tensors, rows, blocks, bits))


def _zero(name: str, node: Any, tensors: dict[str, Any], rows: int, blocks: int, bits: int) -> Tensor | None:
    """The zero points, float64 ``[N, blocks]``."""
    if len(node.input) < 4 or not node.input[3]:
        return None
    if _values(tensors[node.input[3]]).is_floating_point() if node.input[3] in tensors else False:
        return _input(name, node, 3, tensors, (rows, blocks), (torch.float32, torch.float16, torch.bfloat16)).double()
    packed = _input(name, node, 3, tensors, (rows, -(-blocks * bits // 8)), (torch.uint8,))
    return fields(packed, bits, blocks).double()


def fields(data: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` fields of each row of bytes ``[R, n]``."""
    whole = torch.nn.functional.pad(data, (0, -data.size(1) % 4)).contiguous()
    return unpack_fields(whole.view(torch.int32), bits, count)


def _input(
    name: str, node: Any, position: int, tensors: dict[str, Any], shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """An input of ``node`` that is a constant, in ``shape``, which older files flatten."""
    known = tensors.get(node.input[position]) if position < len(node.input) else None
    if known is None:
        raise CorruptModelError(f"layer {name!r} has no constant for input {position} of MatMulNBits; export it anew")
    values = _values(known)
    if values.dtype not in dtypes or values.numel() != shape[0] * shape[1]:
        raise CorruptModelError(
            f"input {position} of layer {name!r} is {tuple(values.shape)} of {values.dtype} where {shape} is due"
        )
    return values.reshape(shape)


def _values(tensor: Any) -> Tensor:
    import onnx

    try:
        return torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
    except PARSING_ERRORS as error:
        raise CorruptModelError(f"tensor {tensor.name!r} is damaged ({error}); export the model anew") from error
