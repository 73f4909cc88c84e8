"""Fill a model on the meta device with the tensors of a file of another project."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from kbit_inductor.errors import ModelMismatchError
from kbit_inductor.logs import logger
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.models.surgery import packed_module
from kbit_inductor.packing import PackedWeight

log = logger("pack")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones by each of their names."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def awaited(model: nn.Module) -> list[str]:
    """Names of the tensors that have no values yet."""
    return [name for name, tensor in tensors(model).items() if tensor.is_meta]


def takes_packed(model: nn.Module, name: str) -> bool:
    """Whether every module that has the parameter ``name`` is an nn.Linear or nn.Embedding."""
    return all(type(module) in (nn.Linear, nn.Embedding) for _, _, module in _places(model, model.get_parameter(name)))


def put_packed(model: nn.Module, name: str, packed: PackedWeight, rows: int, order: Tensor | None = None) -> None:
    """Put a packed module in every place of the parameter ``name``, ``[rows, packed.columns]``, with its dtype."""
    weight = model.get_parameter(name)
    check_shape(name, weight, (rows, packed.columns))
    matrix = PackedMatrix(packed, rows, weight.dtype, order)
    for parent, key, module in _places(model, weight):
        parent._modules[key] = packed_module(module, matrix).eval()


def put_float(model: nn.Module, name: str, values: Tensor) -> None:
    """Put ``values`` in every place of the parameter or buffer ``name``, in its dtype."""
    old = tensors(model)[name]
    check_shape(name, old, tuple(values.shape))
    values = values.to(old.dtype)
    value = nn.Parameter(values, requires_grad=False) if isinstance(old, nn.Parameter) else values
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key in [key for key, tensor in table.items() if tensor is old]:
                table[key] = value  # type: ignore[assignment]


def check_shape(name: str, tensor: Tensor, found: tuple[int, ...]) -> None:
    """Raise ModelMismatchError where ``name`` of the file, of the shape ``found``, is no such ``tensor``."""
    if found != tuple(tensor.shape):
        raise ModelMismatchError(f"{name} of the model is {tuple(tensor.shape)}, of the file {found}; give the file of this model")


def finish(model: nn.Module, names: Iterable[str], rounded: dict[str, float], source: object) -> None:
    """Tell of the ``rounded`` weights, and raise ModelMismatchError where one of the tensors ``names`` still has no values."""
    tell_rounded(rounded, source)
    missing = [name for name in names if (found := tensors(model).get(name)) is not None and found.is_meta]
    if missing:
        raise ModelMismatchError(f"{source} has no {missing[0]!r}, which the model has ({len(missing)} such tensors)")


def tell_rounded(rounded: dict[str, float], source: object) -> None:
    """Log, once for all, which weights of ``source`` have not all the values of the file: by name, their squared relative error."""
    if rounded:
        worst = max(rounded, key=lambda name: rounded[name])
        log.warning(
            "%s: packed weights whose scales or levels were rounded, as the storage format does not hold them: %d; "
            "the largest error is %.2g of the norm of %s", source, len(rounded), rounded[worst] ** 0.5, worst,
        )  # fmt: skip


def _places(model: nn.Module, weight: Tensor) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parent, key and module wherever the parameter ``weight`` is."""
    return [
        (parent, key, module)
        for parent in model.modules()
        for key, module in parent.named_children()
        if any(parameter is weight for parameter in module._parameters.values())
    ]
