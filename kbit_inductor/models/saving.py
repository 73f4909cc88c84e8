"""Save a model with its packed weights, and load it without ever making its floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor._compat import uncompiled
from kbit_inductor.errors import (
    CorruptModelError,
    InvalidOptionError,
    ModelMismatchError,
    NotAModelFolderError,
    ReleasedWeightError,
    UnsavableModelError,
)
from kbit_inductor.models.modelfile import (
    DTYPES,
    OPTIONS,
    Manifest,
    Reader,
    StoredWeight,
    Writer,
    locked,
    remove_others,
)
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.models.surgery import packed_matrices, packed_module
from kbit_inductor.packing import PackedWeight
from kbit_inductor.progress import Progress
from kbit_inductor.quantizers import Levels
from kbit_inductor.side import SIDE, Side
from kbit_inductor.weights.release import MEND, Trimmer, is_released, trim_heap

SHARD_BYTES = 256 << 20


@torch.no_grad()
def save(model: nn.Module, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``model`` to ``folder``, packed weights as they are, so that :func:`load` gives it back.

    Every parameter and buffer is written, buffers that are in no state dict among them; tied ones once. A model that is in the
    folder already is replaced in one step: whatever happens meanwhile, the folder has the old model or the new one.

    Args:
        model: on any device. Without packed weights it is saved as well. One that ``torch.compile`` has returned is saved as the
            model that was compiled.
        folder: made where it is not there.
        shard_bytes: of a file, unless one weight is larger. So much is in memory besides the model.

    Raises:
        ReleasedWeightError: a weight was freed by ``release_weights=True``.
        UnsavableModelError: a tensor has no values, or a dtype that the format does not have.
        NotAModelFolderError: ``folder`` is a file.
        InvalidOptionError: ``shard_bytes`` is not positive.
    """
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise InvalidOptionError(f"option 'shard_bytes' is {shard_bytes!r}; give a positive integer")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotAModelFolderError(f"{folder} is a file; give a folder, or a name that nothing has yet")
    model = uncompiled(model)
    matrices = packed_matrices(model)
    floats, aliases = _floats(model)
    description = _description(model)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, shared=False), Progress(len(matrices) + len(floats), "saving") as progress:
        writer = Writer(folder, shard_bytes)
        weights = []
        for matrix, layers in matrices.items():
            writer.add({f"{layers[0]}.weight.{name}": tensor for name, tensor in matrix.stored().items()})
            weights.append(stored_weight(matrix, layers))
            progress.advance(layers[0])
        for name, tensor in floats.items():
            writer.add({name: tensor})
            progress.advance(name)
        writer.flush()
        manifest = Manifest(tuple(weights), writer.tensors, aliases, description)
        manifest.write(folder)
        remove_others(folder, manifest)


@torch.no_grad()
def load(
    folder: str | Path, model: nn.Module | Callable[[], nn.Module] | None = None, *, device: torch.device | str = "cpu"
) -> nn.Module:
    """The model that :func:`save` has written to ``folder``.

    Its float weights are never made: the model is built on the meta device, and takes packed weights one by one. What stays in
    float is memory-mapped. Every tensor is checked against its hash.

    Args:
        folder: written by :func:`save`.
        model: a function that makes the model as it was before ``quantize_``, its class for one, and is called on the meta device;
            or such a model, which is changed in place. None for a model of transformers, whose class and configuration were saved.
        device: where it is put.

    Raises:
        NotAModelFolderError, FormatVersionError, CorruptModelError: about the files.
        ModelMismatchError: ``model`` is not the one that was saved, or None is given and it is none of transformers.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotAModelFolderError(f"{folder} is no folder; give one that kbit_inductor.save has written")
    with locked(folder, shared=True):
        manifest = Manifest.read(folder)
        reader = Reader(folder, manifest)
        built = _built(manifest, model, folder)
        # The largest first: what its conversion takes besides is there while little else is.
        weights = sorted(manifest.weights, key=lambda weight: -weight.rows * weight.columns)
        trimmer = Trimmer()
        with Progress(len(weights), "loading") as progress:
            for weight in weights:
                _put_packed(built, weight, reader, device)
                trimmer.converted(weight.rows * weight.columns)
                progress.advance(weight.layers[0])
        _put_floats(built, manifest, reader, device)
    _check_complete(built)
    trim_heap()
    return built


def _floats(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers but for those of packed weights, by their first name, and the further names of each."""
    packed = _packed_buffers(model)
    first: dict[int, str] = {}
    floats: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in _tensors(model).items():
        if id(tensor) in packed:
            continue
        if is_released(tensor):
            raise ReleasedWeightError(f"{name!r} cannot be saved, it was freed by release_weights=True; {MEND}")
        if tensor.is_meta or tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
            what = f"{tensor.layout}, {tensor.dtype} on {tensor.device}"
            raise UnsavableModelError(
                f"{name!r} cannot be saved: it is {what}; give it values, of a dtype among {', '.join(DTYPES)}"
            )
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            floats[name] = tensor
    return floats, aliases


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def stored_weight(matrix: PackedMatrix, layers: list[str]) -> StoredWeight:
    """What is written of the packed weight of ``layers`` beside its operands."""
    options = {name: getattr(matrix.config, name) for name in OPTIONS}
    dtype = str(matrix.dtype).removeprefix("torch.")
    return StoredWeight(tuple(layers), matrix.rows, matrix.columns, dtype, matrix.error, options, matrix.order is not None)


def _description(model: nn.Module) -> Mapping[str, Any] | None:
    """Class and configuration of a model of transformers, which is imported where there is one."""
    if not any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return None
    from kbit_inductor import huggingface

    return huggingface.description(model)


def _built(manifest: Manifest, model: nn.Module | Callable[[], nn.Module] | None, folder: Path) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if model is None:
        if manifest.transformers is None:
            raise ModelMismatchError(f"{folder} holds no model of transformers; give load() a function that makes it, or its class")
        from kbit_inductor import huggingface

        return huggingface.build(manifest.transformers)
    with torch.device("meta"):
        return model()


def _put_packed(model: nn.Module, weight: StoredWeight, reader: Reader, device: torch.device | str) -> None:
    """Read one packed weight and put it where it belongs."""
    first = weight.layers[0]
    places = [(name, *place_of(model, name, weight)) for name in weight.layers]
    tensors = reader.read([f"{first}.weight.{name}" for name in weight.specs])
    matrix = packed_matrix(weight, {name: tensors[f"{first}.weight.{name}"] for name in weight.specs}, device)
    made: dict[nn.Module, nn.Module] = {}
    for _, parent, key, module in places:
        if module not in made:
            made[module] = packed_module(module, matrix).train(module.training)
        parent._modules[key] = made[module]


def packed_matrix(weight: StoredWeight, operands: Mapping[str, Tensor], device: torch.device | str) -> PackedMatrix:
    """The weight on ``device`` whose ``operands`` were read, by their names in the storage format and in its order.

    Raises:
        CorruptModelError: they do not fit what is said of it, the codebook is another one, or the order is none.
    """
    config, first = weight.config, weight.layers[0]
    for name, tensor in operands.items():
        if (tuple(tensor.shape), tensor.dtype) != weight.specs[name]:
            raise CorruptModelError(f"{first}.weight.{name} is {tuple(tensor.shape)} of {tensor.dtype}, which fits no {config}")
    levels = Levels(config.bits, config.levels()).table(torch.device("cpu"))
    if levels is not None and not torch.equal(operands["codebook"].cpu(), levels):
        raise CorruptModelError(f"{first}.weight.codebook is not the codebook {config.codebook!r}; save the model again")
    columns = operands.get("side_columns")
    if columns is not None and not bool(((columns >= 0) & (columns < weight.columns)).all()):
        raise CorruptModelError(f"{first}.weight.side_columns is not among {weight.columns} columns; save the model again")
    order = operands.get("order")
    if order is not None and not torch.equal(order.cpu().sort().values, torch.arange(weight.columns, dtype=torch.int32)):
        raise CorruptModelError(f"{first}.weight.order is no order of {weight.columns} columns; save the model again")
    kept = {name: tensor.to(device) for name, tensor in operands.items() if name != "order"}
    side = Side.of({name: kept.pop(name) for name in SIDE if name in kept})
    packed = PackedWeight(tuple(kept.values()), config, weight.columns, weight.error, side=side)
    return PackedMatrix(packed, weight.rows, DTYPES[weight.dtype], None if order is None else order.to(device))


def place_of(model: nn.Module, name: str, weight: StoredWeight) -> tuple[nn.Module, str, nn.Module]:
    """Parent, key and module of the layer ``name``, which must be one that ``weight`` fits."""
    path, _, key = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        module = parent.get_submodule(key)
    except AttributeError:
        raise ModelMismatchError(
            f"the model has no layer {name!r}, which the saved one has; give the class that was saved"
        ) from None
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        kind = type(module).__name__
        raise ModelMismatchError(f"layer {name!r} of the model is a {kind}, the saved one is packed; give the class that was saved")
    if tuple(module.weight.shape) != (weight.rows, weight.columns):
        raise ModelMismatchError(
            f"layer {name!r} of the model is {tuple(module.weight.shape)}, the saved one {(weight.rows, weight.columns)}; "
            "give the configuration that was saved"
        )
    return parent, key, module


def _put_floats(model: nn.Module, manifest: Manifest, reader: Reader, device: torch.device | str) -> None:
    """Read the parameters and buffers that are not packed and put them in their places, tied ones in several."""
    operands = {f"{weight.layers[0]}.weight" for weight in manifest.weights}
    packed = _packed_buffers(model)
    present = {name: tensor for name, tensor in _tensors(model).items() if id(tensor) not in packed}
    places = {name: [name] for name in manifest.tensors if name.rpartition(".")[0] not in operands}
    for alias, target in manifest.aliases.items():
        places[target].append(alias)
    saved = {name for names in places.values() for name in names}
    if different := sorted(saved ^ present.keys()):
        which, other = ("saved", "given") if different[0] in saved else ("given", "saved")
        raise ModelMismatchError(f"the {which} model has {different[0]!r} and the {other} one has not; give what was saved")
    for name, names in places.items():
        value, old = reader.read([name])[name].to(device), present[name]
        if old.shape != value.shape:
            raise ModelMismatchError(f"{name!r} of the model is {tuple(old.shape)}, of the saved one {tuple(value.shape)}")
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, old.requires_grad)
        for holder in names:
            path, _, key = holder.rpartition(".")
            module = model.get_submodule(path)
            table: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
            table[key] = value


def _packed_buffers(model: nn.Module) -> set[int]:
    return {id(buffer) for module in model.modules() if isinstance(module, PackedMatrix) for buffer in module.buffers()}


def _check_complete(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if not isinstance(module, PackedMatrix):
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_meta:
                    raise ModelMismatchError(
                        f"attribute {name!r} of {path or 'the model'}, neither parameter nor buffer, was not saved; "
                        "give load() the model itself, made with values, or register it as a buffer"
                    )
