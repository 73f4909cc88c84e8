"""A model of transformers on the weights of a GGUF file, taken over as they are. transformers and gguf must be installed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kbit_inductor.errors import ModelMismatchError, NotAModelFileError
from kbit_inductor.logs import logger
from kbit_inductor.models.gguf_blocks import TYPES, packed_of
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.models.surgery import packed_module
from kbit_inductor.progress import Progress
from kbit_inductor.release import trim_heap

log = logger("pack")


@torch.no_grad()
def from_gguf(path: str | Path) -> nn.Module:
    """The causal language model of transformers in the GGUF file ``path``, in evaluation mode, without its float weights.

    Weights of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 become packed ones of the very same values. All others become float32 parameters;
    a warning names quantized types among them, and :func:`kbit_inductor.quantize_` packs them.

    Raises:
        NotAModelFileError: there is no such file, or it is no GGUF file.
        ModelMismatchError: transformers has no such architecture, or has its weights in another form than the file.
    """
    from kbit_inductor import huggingface

    path = Path(path)
    reader = _opened(path)
    model, names, processor = huggingface.gguf_skeleton(path)
    left = dict.fromkeys(name for name, tensor in _tensors(model).items() if tensor.is_meta)
    in_float: Counter[str] = Counter()
    # The largest first: what its conversion takes besides is there while little else is.
    tensors = sorted(reader.tensors, key=lambda tensor: -tensor.n_elements)
    with Progress(len(tensors), "reading GGUF") as progress:
        for tensor in tensors:
            progress.advance(tensor.name)
            name = names.get(tensor.name)
            if name is None:
                log.info("%s of the file has no place in the model", tensor.name)
                continue
            kind = tensor.tensor_type.name
            order = _row_order(processor, tensor, names) if kind in TYPES and name.endswith(".weight") else None
            if order is not None and _put_packed(model, name, torch.from_numpy(tensor.data), kind, order):
                trim_heap()
            else:
                in_float.update([kind] if kind not in ("F32", "F16", "BF16", "F64") else [])
                _put_float(model, name, processor, tensor, names)
    if in_float:
        counts = ", ".join(f"{count} of {kind}" for kind, count in in_float.items())
        log.warning("weights that the storage format does not hold exactly stay in float: %s; quantize_ packs them", counts)
    missing = [name for name in left if (found := _tensors(model).get(name)) is not None and found.is_meta]
    if missing:
        raise ModelMismatchError(f"{path} has no {missing[0]!r}, which the model of transformers has ({len(missing)} such tensors)")
    return model


def _opened(path: Path) -> Any:
    from gguf import GGUFReader

    if not path.is_file():
        raise NotAModelFileError(f"{path} is no file; give a GGUF file")
    try:
        return GGUFReader(path, "c")  # writable in memory: torch wants it so
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise NotAModelFileError(f"{path} is no GGUF file, or is damaged ({error}); copy it anew") from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _row_order(processor: Any, tensor: Any, names: dict[str, str]) -> Tensor | None:
    """Which rows of the file those of the model are; None where the model has the matrix in another form."""
    if len(tensor.shape) != 2:
        return None
    rows = int(tensor.shape[1])
    moved = _processed(processor, tensor.name, np.arange(rows, dtype=np.float64)[:, None], names)
    if moved.shape != (rows, 1) or not np.array_equal(np.sort(moved[:, 0]), np.arange(rows)):
        return None
    return torch.from_numpy(moved[:, 0].astype(np.int64))


def _processed(processor: Any, name: str, weights: Any, names: dict[str, str]) -> Any:
    """``weights`` of the file as the model has them."""
    parsed: dict[str, Any] = {"tensors": {}}
    result = processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=parsed)
    if parsed["tensors"] or result.name != name:
        raise ModelMismatchError(f"{name} of the file is spread over several tensors of the model, which is not supported")
    return result.weights


def _put_packed(model: nn.Module, name: str, data: Tensor, kind: str, order: Tensor) -> bool:
    """Put a packed module in every place of the parameter ``name``; False where one is neither nn.Linear nor nn.Embedding."""
    weight = model.get_parameter(name)
    places = [
        (parent, key, module)
        for parent in model.modules()
        for key, module in parent.named_children()
        if any(parameter is weight for parameter in module._parameters.values())
    ]
    if not all(type(module) in (nn.Linear, nn.Embedding) for _, _, module in places):
        return False
    packed = packed_of(data, kind, order)
    if (data.size(0), packed.columns) != tuple(weight.shape):
        raise ModelMismatchError(f"{name} of the model is {tuple(weight.shape)}, of the file {(data.size(0), packed.columns)}")
    matrix = PackedMatrix(packed, data.size(0), torch.float32)
    for parent, key, module in places:
        parent._modules[key] = packed_module(module, matrix).eval()
    return True


def _put_float(model: nn.Module, name: str, processor: Any, tensor: Any, names: dict[str, str]) -> None:
    from gguf import dequantize

    values = torch.from_numpy(np.copy(_processed(processor, tensor.name, dequantize(tensor.data, tensor.tensor_type), names)))
    old = _tensors(model)[name]
    if values.shape != old.shape:
        raise ModelMismatchError(f"{name} of the model is {tuple(old.shape)}, of the file {tuple(values.shape)}")
    value = nn.Parameter(values, requires_grad=False)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = value
