"""A model of transformers on the weights of a GGUF file, taken over as they are. transformers and gguf must be installed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kbit_inductor.errors import NotAModelFileError
from kbit_inductor.logs import logger
from kbit_inductor.models import filling
from kbit_inductor.models.damage import PARSING_ERRORS
from kbit_inductor.models.gguf_blocks import TYPES, packed_of
from kbit_inductor.progress import Progress
from kbit_inductor.weights.release import trim_heap

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
    path = Path(path)
    reader = opened(path)
    reader.fields.clear()  # arrays for each token of the vocabulary: more than the weights of a small model
    from kbit_inductor.models.gguf_transformers import Form, skeleton

    model = skeleton(path, len(reader.tensors))
    form = Form.of(model)
    left = filling.awaited(model)
    in_float: Counter[str] = Counter()
    rounded: dict[str, float] = {}
    # The largest first: what its conversion takes besides is there while little else is.
    tensors = sorted(reader.tensors, key=lambda tensor: -tensor.n_elements)
    with Progress(len(tensors), "reading GGUF") as progress:
        for tensor in tensors:
            progress.advance(tensor.name)
            name = form.names.get(tensor.name)
            if name is None:
                log.info("%s of the file has no place in the model", tensor.name)
                continue
            kind = tensor.tensor_type.name
            packs = kind in TYPES and name.endswith(".weight") and filling.takes_packed(model, name)
            order = form.row_order(tensor.name, len(tensor.data)) if packs else None
            if order is not None:
                packed = packed_of(torch.from_numpy(tensor.data), kind, order, name)
                filling.put_packed(model, name, packed, order.numel())
                rounded |= {name: packed.error} if packed.error else {}
                trim_heap()
            else:
                in_float.update([kind] if kind not in ("F32", "F16", "BF16", "F64") else [])
                values = form.values(tensor.name, _floats(tensor))
                filling.put_float(model, name, torch.from_numpy(np.copy(values)))
    if in_float:
        counts = ", ".join(f"{count} of {kind}" for kind, count in in_float.items())
        log.warning("weights of types that the storage format has no form for stay in float: %s; quantize_ packs them", counts)
    filling.finish(model, left, rounded, path)
    return model


def opened(path: Path) -> Any:
    """A reader of the GGUF file ``path``.

    Raises:
        NotAModelFileError: it is none.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise NotAModelFileError(f"{path} is no file; give a GGUF file")
    try:
        return GGUFReader(path, "c")  # writable in memory: torch wants it so
    except PARSING_ERRORS as error:
        raise NotAModelFileError(f"{path} is no GGUF file, or is damaged ({error}); copy it anew") from error


def _floats(tensor: Any) -> Any:
    """The floats of a tensor of the file."""
    import gguf

    return gguf.dequantize(tensor.data, tensor.tensor_type)
