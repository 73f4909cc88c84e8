"""A packed model of transformers as a folder of GPTQ's safetensors, every value as it is (the layout: :mod:`..importers.gptq`).

The older convention of zero points is written, ``checkpoint_format`` ``"gptq"``, which all readers know. A format for the whole
folder has one width and one group size, zero points that are integers, and float16 scales: so all packed layers must be symmetric
and alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kbit_inductor import alike
from kbit_inductor.atomic import replacing
from kbit_inductor.errors import ModelMismatchError, UnsavableModelError
from kbit_inductor.kernels.layout import unpack_codes
from kbit_inductor.models.importers.fields import pack_fields
from kbit_inductor.models.modelfile import locked
from kbit_inductor.models.modules import PackedEmbedding, PackedMatrix
from kbit_inductor.models.surgery import packed_matrices
from kbit_inductor.packing import plane_operands

BITS = (2, 3, 4, 8)  # of which GPTQ's packages have kernels
FIELDS = 32  # rows and columns come in whole words of every width
WEIGHTS = "model.safetensors"


@torch.no_grad()
def to_gptq(model: nn.Module, folder: str | Path) -> None:
    """Write ``model`` to ``folder`` as GPTQ's packages do, all that is not packed as it is.

    Args:
        model: of transformers. Its packed layers are linear, symmetric, of 2, 3, 4 or 8 bits and of one group size.
        folder: made where it is not there. The configuration is written last.

    Raises:
        UnsavableModelError: packed layers that the format does not hold exactly; all of them are named.
        ModelMismatchError: it is no model of transformers, or has no packed layer.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelMismatchError(f"a {type(model).__name__} is no model of transformers, with a configuration to write")
    layers = {name: matrix for matrix, names in packed_matrices(model).items() for name in names}
    if not layers:
        raise ModelMismatchError("the model has no packed layer; quantize_ it first, with symmetric=True and skip=['lm_head']")
    first = next(iter(layers.values()))
    common = (first.config.bits, first.config.group_size)
    if misfits := [name for name, matrix in layers.items() if not _fits(model.get_submodule(name), matrix, common)]:
        raise UnsavableModelError(
            f"GPTQ's format does not hold these layers exactly: {', '.join(alike.names(misfits))}; pack linear layers alike, with "
            f"symmetric=True, bits of {BITS}, rows and columns that {FIELDS} divides, no codebook, and skip= the rest"
        )
    tensors = dict(_floats(model))
    for name, matrix in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in _packed(matrix).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, shared=False):
        with replacing(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        with replacing(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(_configuration(model, first), indent=2) + "\n", encoding="utf-8")


def _fits(module: nn.Module, matrix: PackedMatrix, common: tuple[int, int]) -> bool:
    config = matrix.config
    scale = _scale(matrix)
    return (
        not isinstance(module, PackedEmbedding)
        and config.symmetric
        and config.levels() is None
        and config.bits in BITS
        and (config.bits, config.group_size) == common
        and matrix.rows % FIELDS == matrix.columns % FIELDS == 0
        and torch.equal(scale.half().double(), scale)
    )


def _scale(matrix: PackedMatrix) -> Tensor:
    """Float64 ``[N, G]``."""
    _, scale, _, unit, _ = plane_operands(matrix.packed.plain.laid_out("planes").operands, matrix.config)
    return scale.double().cpu() * unit.cpu()


def _packed(matrix: PackedMatrix) -> dict[str, Tensor]:
    """The tensors of a layer by what follows its name."""
    bits, columns = matrix.config.bits, matrix.columns
    codes = unpack_codes(matrix.packed.plain.laid_out("planes").operands[0].cpu(), columns)
    group = (torch.arange(columns) // matrix.group_size).int()
    if matrix.order is not None:
        back = matrix.order.cpu().argsort()
        codes, group = codes[:, back], group[back]
    scale = _scale(matrix).half().t().contiguous()
    zero = torch.full(scale.shape, 2 ** (bits - 1) - 1, dtype=torch.uint8)
    words = {"qweight": pack_fields(codes, bits).t().contiguous(), "qzeros": pack_fields(zero, bits)}
    return {**words, "scales": scale, "g_idx": group.contiguous()}


def _floats(model: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and the buffers of a state dict, tied ones once, in memory of their own."""
    packed = {f"{name}.weight" for names in packed_matrices(model).values() for name in names}
    state = model.state_dict()
    once = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    kept = [name for name in once if name in state and name.rpartition(".")[0] not in packed]
    return {name: state[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in kept}


def _configuration(model: Any, matrix: PackedMatrix) -> dict[str, Any]:
    told = {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": matrix.config.bits, "group_size": matrix.config.group_size,
        "sym": True, "desc_act": matrix.order is not None,
    }  # fmt: skip
    return {**json.loads(model.config.to_json_string(use_diff=False)), "quantization_config": told}
