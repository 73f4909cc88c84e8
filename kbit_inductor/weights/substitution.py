"""A float model that runs on packed values of some of its weights, for as long as somebody looks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from kbit_inductor.packing import PackedWeight


@contextlib.contextmanager
def substituted(model: nn.Module, packed: Mapping[Tensor, PackedWeight]) -> Iterator[None]:
    """``model`` with the weights ``packed``, each turned into floats while its module runs, so that one is there at a time."""
    hooks = []
    by_id = {id(weight): one for weight, one in packed.items()}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if (one := by_id.get(id(weight))) is not None:
                hooks.append(module.register_forward_pre_hook(functools.partial(_put, weight, one)))
                hooks.append(module.register_forward_hook(functools.partial(_put_back, weight, weight.data), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _put(weight: Tensor, packed: PackedWeight, module: nn.Module, arguments: Any) -> None:
    weight.data = packed.dequantize(weight.dtype)


def _put_back(weight: Tensor, data: Tensor, module: nn.Module, arguments: Any, output: Any) -> None:
    weight.data = data
