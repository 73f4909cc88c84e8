"""A model in a folder that another project has packed, taken over without its floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from kbit_inductor.errors import NotAModelFolderError, UnsupportedFormatError
from kbit_inductor.logs import logger
from kbit_inductor.models import filling
from kbit_inductor.models.importers import awq, bitsandbytes, compressed, gptq, hqq
from kbit_inductor.models.importers.coded import CodedWeight
from kbit_inductor.models.importers.tensors import Checkpoint, Layer, as_kind, read_json
from kbit_inductor.progress import Progress
from kbit_inductor.weights.release import trim_heap

log = logger("pack")


@dataclass(frozen=True)
class Format:
    """How a project writes packed layers.

    Attributes:
        marks: what follows a layer's name in a tensor that only packed layers have.
        read: from the tensors of a layer, rows and columns to its weight.
    """

    marks: tuple[str, ...]
    read: Callable[[Layer, int, int], CodedWeight]


FORMATS: Mapping[str, Format] = MappingProxyType({
    "gptq": Format(gptq.MARKS, gptq.read),
    "awq": Format(awq.MARKS, awq.read),
    "compressed-tensors": Format(compressed.MARKS, compressed.read),
    "bitsandbytes": Format(bitsandbytes.MARKS, bitsandbytes.read),
    "hqq": Format(hqq.MARKS, hqq.read),
})  # fmt: skip
"""By the ``quant_method`` of ``config.json``."""
OLD_CONFIGURATIONS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of AutoGPTQ and AutoAWQ, beside config.json


@torch.no_grad()
def from_checkpoint(folder: str | Path, model: Callable[[], nn.Module] | None = None, *, exact: bool = True) -> nn.Module:
    """The model that another project has packed and saved in ``folder`` as safetensors, without its floats, in evaluation mode.

    Packed layers become packed modules of the same codes (docs/import.md says which formats, and how exactly); all else is taken
    as it is. A warning says how far the values differ where the storage format does not hold them.

    Args:
        folder: with a ``config.json`` that names the ``quant_method``.
        model: a function that makes the model as it was before it was packed, and is called on the meta device. None for a causal
            language model of transformers.
        exact: let codes take one bit more where that makes a layer with zero points exact. False keeps the bits, and rounds
            scale times zero point to float16.

    Raises:
        NotAModelFolderError: there is no model, or it is not packed.
        UnsupportedFormatError: the method, or a variant of it, is not read.
        CorruptModelError: a file is damaged, or its tensors do not fit each other.
        ModelMismatchError: the model is not that of the files.
        NonFiniteWeightError: a scale is NaN or infinite.
    """
    folder = Path(folder)
    format, options = _format(folder)
    tensors = Checkpoint(folder)
    built = _built(tensors, model)
    left = filling.awaited(built)
    layers = {
        name: module
        for name, module in built.named_modules()
        if isinstance(module, nn.Linear) and any(f"{name}.{mark}" in tensors for mark in format.marks)
    }
    rounded: dict[str, float] = {}
    with Progress(len(layers), "reading packed layers") as progress:
        for name, module in sorted(layers.items(), key=lambda item: -item[1].weight.numel()):
            coded = format.read(Layer(tensors, name, options), *module.weight.shape)
            packed = coded.packed(name, exact=exact)
            bits, order = coded.bits, coded.order
            del coded  # and with it the codes of the file, before they are laid out anew
            filling.put_packed(built, f"{name}.weight", packed, packed.rows, order)
            rounded |= {name: packed.error} if packed.error else {}
            log.info("%s: %d bits of the file, %d in memory, relative error %.3g", name, bits, packed.config.bits, packed.error)
            trim_heap()
            progress.advance(name)
    _put_floats(built, tensors, layers)
    filling.finish(built, left, rounded, folder)
    return built


def is_packed(folder: Path) -> bool:
    """Whether ``folder``, which has a ``config.json``, is packed by a method that is read.

    Raises:
        CorruptModelError: the configuration is damaged.
    """
    return _options(folder).get("quant_method") in FORMATS


def _options(folder: Path) -> Mapping[str, Any]:
    """What is said of the quantization; nothing where there is none."""
    config = read_json(folder / "config.json")
    options = config.get("quantization_config") or config.get("compression_config")
    for name, method in OLD_CONFIGURATIONS.items():
        if options is None and (folder / name).is_file():
            options = {"quant_method": method, **read_json(folder / name)}
    return dict(as_kind(dict, options or {}, "quantization_config"))


def _format(folder: Path) -> tuple[Format, Mapping[str, Any]]:
    """How the layers are packed, and the options of the method."""
    options = _options(folder)
    if not options:
        raise NotAModelFolderError(f"{folder}/config.json names no quantization; load it with transformers, then quantize_")
    method = str(options.get("quant_method"))
    if method not in FORMATS:
        raise UnsupportedFormatError(f"{folder} is packed by {method!r}; read are {', '.join(FORMATS)}")
    return FORMATS[method], options


def _built(tensors: Checkpoint, model: Callable[[], nn.Module] | None) -> nn.Module:
    if model is None:
        from kbit_inductor import huggingface

        return huggingface.checkpoint_skeleton(tensors.folder, len(list(tensors)), tensors.nbytes)
    with torch.device("meta"):
        return model().eval().requires_grad_(False)


def _put_floats(model: nn.Module, tensors: Checkpoint, packed: Mapping[str, nn.Module]) -> None:
    """All that belongs to no packed layer, and the biases of those."""
    known = filling.tensors(model)
    of_packed = tuple(f"{name}." for name in packed)
    for name in tensors:
        if name.startswith(of_packed) and not name.endswith(".bias"):
            continue
        if name in known:
            filling.put_float(model, name, tensors.read(name))
        else:
            log.info("%s of the files has no place in the model", name)
