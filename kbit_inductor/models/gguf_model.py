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
from kbit_inductor.models import filling
from kbit_inductor.models.gguf_blocks import TYPES, packed_of
from kbit_inductor.progress import Progress
from kbit_inductor.release import trim_heap

log = logger("pack")


@torch.no_grad()
def from_gguf(path: str | Path) -> nn.Module:
    """The causal language model of transformers in the GGUF file ``path``, in evaluation mode, without its float weights.

    Weights of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 become packed ones of the very same values; those of the K quants keep their codes,
    and their steps are rounded to float16. All others become float32 parameters. A warning says how far the values differ, and
    names quantized types that stay in float, which :func:`kbit_inductor.quantize_` packs.

    Raises:
        NotAModelFileError: there is no such file, or it is no GGUF file.
        ModelMismatchError: transformers has no such architecture, or has its weights in another form than the file.
        NonFiniteWeightError: a step of a block is NaN or infinite.
    """
    from kbit_inductor import huggingface

    path = Path(path)
    reader = _opened(path)
    model, names, processor = huggingface.gguf_skeleton(path)
    left = filling.awaited(model)
    in_float: Counter[str] = Counter()
    rounded: dict[str, float] = {}
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
            packs = kind in TYPES and name.endswith(".weight") and filling.takes_packed(model, name)
            order = _row_order(processor, tensor, names) if packs else None
            if order is not None:
                packed = packed_of(torch.from_numpy(tensor.data), kind, order, name)
                filling.put_packed(model, name, packed, order.numel())
                rounded |= {name: packed.error} if packed.error else {}
                trim_heap()
            else:
                in_float.update([kind] if kind not in ("F32", "F16", "BF16", "F64") else [])
                values = _processed(processor, tensor.name, _floats(tensor), names)
                filling.put_float(model, name, torch.from_numpy(np.copy(values)))
    if in_float:
        counts = ", ".join(f"{count} of {kind}" for kind, count in in_float.items())
        log.warning("weights of types that the storage format has no form for stay in float: %s; quantize_ packs them", counts)
    if rounded:
        log.warning("%s: %s", path, filling.rounding_note(rounded))
    filling.check_filled(model, left, path)
    return model


def _opened(path: Path) -> Any:
    from gguf import GGUFReader

    if not path.is_file():
        raise NotAModelFileError(f"{path} is no file; give a GGUF file")
    try:
        return GGUFReader(path, "c")  # writable in memory: torch wants it so
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise NotAModelFileError(f"{path} is no GGUF file, or is damaged ({error}); copy it anew") from error


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


def _floats(tensor: Any) -> Any:
    """The floats of a tensor of the file."""
    import gguf

    return gguf.dequantize(tensor.data, tensor.tensor_type)
