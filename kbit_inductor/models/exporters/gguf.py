"""A packed model of transformers as a GGUF file, every value as it is. gguf and accelerate must be installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kbit_inductor import alike
from kbit_inductor.atomic import replacing
from kbit_inductor.errors import ModelMismatchError, UnsavableModelError
from kbit_inductor.models.exporters.blocks import BLOCK, BYTES, block_type, to_blocks
from kbit_inductor.models.gguf_model import opened
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.models.surgery import packed_matrices
from kbit_inductor.progress import Progress

NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type")
PLAIN = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@torch.no_grad()
def to_gguf(model: nn.Module, path: str | Path, *, like: str | Path | None = None) -> None:
    """Write ``model`` to ``path``, packed weights as blocks of the very same values.

    Fitting are layers of a group size that is a multiple of 32, of 1 to 8 bits when symmetric, also with a codebook, and of 1 to 5
    bits otherwise. They take the next type that holds them: 3 bits take 4.

    Args:
        model: a causal language model of transformers, of an architecture that GGUF and transformers both have.
        path: of the file, which is replaced in one step.
        like: a GGUF file of the same model in other types, whose description and tokenizer are taken over. Without one the file has
            no tokenizer, so that llama.cpp takes numbers of tokens alone.

    Raises:
        UnsavableModelError: packed layers that fit no type; all of them are named.
        ModelMismatchError: no such model, or the architecture has no form in GGUF that transformers knows.
        NotAModelFileError: ``like`` is no GGUF file.
    """
    from kbit_inductor.models.gguf_transformers import form_and_description

    form, architecture, description = form_and_description(model)
    tensors = _tensors(model, form.names)
    with replacing(Path(path)) as temporary, Progress(len(tensors), "writing GGUF") as progress:
        writer = _writer(temporary, architecture, description, None if like is None else Path(like))
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.uint8), math.prod(tensor.shape), gguf_type(tensor.kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            data = tensor.data()
            order = form.row_order(tensor.name, len(data))
            if order is None:
                raise ModelMismatchError(f"{tensor.name} has another form in GGUF than in transformers, which is not written")
            moved = torch.empty_like(data)
            moved[order] = data
            writer.write_tensor_data(moved.numpy())
            progress.advance(tensor.name)
        writer.close()


@dataclass(frozen=True)
class Outgoing:
    """A tensor of the file.

    Attributes:
        name: in the file.
        kind: its type.
        shape: in bytes, the last extent.
        data: gives its bytes, uint8 ``[N, bytes of a row]``; of a vector a row for each element.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: Callable[[], Tensor]


def _tensors(model: nn.Module, names: Mapping[str, str]) -> list[Outgoing]:
    """All that is written, of tied weights the first."""
    matrices = {f"{layers[0]}.weight": matrix for matrix, layers in packed_matrices(model).items()}
    file_name = {name: key for key, name in names.items()}
    packed = {name: matrix.packed.plain.laid_out("planes") for name, matrix in matrices.items()}
    kinds = {name: None if matrices[name].order is not None else block_type(weight) for name, weight in packed.items()}
    if misfits := [name.removesuffix(".weight") for name, kind in kinds.items() if kind is None]:
        raise UnsavableModelError(
            f"no type of GGUF holds these layers exactly: {', '.join(alike.names(misfits))}; pack them with a group_size "
            "that 32 divides, and symmetric=True or 5 bits or fewer (end_bits is the least of tables and heads)"
        )
    del packed
    floats = dict(model.named_parameters())
    if homeless := [name for name in (*matrices, *floats) if name not in file_name]:
        raise ModelMismatchError(f"GGUF has no name for {homeless[0]!r}, which the model has")
    found = [_packed(file_name[name], matrix, str(kinds[name])) for name, matrix in matrices.items()]
    return found + [_plain(file_name[name], tensor.detach().cpu()) for name, tensor in floats.items()]


def _packed(name: str, matrix: PackedMatrix, kind: str) -> Outgoing:
    shape = (matrix.rows, matrix.columns // BLOCK * BYTES[kind])
    return Outgoing(name, kind, shape, lambda: to_blocks(matrix.packed.plain.laid_out("planes"), kind))


def _plain(name: str, tensor: Tensor) -> Outgoing:
    values = tensor.float() if tensor.dim() < 2 else tensor  # llama.cpp wants vectors in float32
    data = values.contiguous().view(torch.uint8)
    rows = data.view(values.size(0), -1)
    return Outgoing(name, PLAIN[values.dtype], tuple(data.shape), lambda: rows)


def gguf_type(kind: str) -> Any:
    """gguf's own name for ``kind``."""
    import gguf

    return gguf.GGMLQuantizationType[kind]


def _writer(path: Path, architecture: str, description: Mapping[str, Any], like: Path | None) -> Any:
    """A writer whose description is that of ``like``, or else ``description``."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    if like is None:
        for key, value in description.items():
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
        writer.add_tokenizer_model("none")
        return writer
    fields = opened(like).fields
    theirs = fields["general.architecture"].contents() if "general.architecture" in fields else None
    if theirs != architecture:
        raise ModelMismatchError(f"{like} is of the architecture {theirs!r}, the model of {architecture!r}")
    for key, field in fields.items():
        if not key.startswith(NOT_COPIED):
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
    return writer
