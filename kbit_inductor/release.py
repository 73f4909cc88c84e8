"""Freeing the float weights of a packed model, and what becomes of their other uses.

A released parameter keeps its shape, dtype and identity, so guards hold and recompiles find its packed form; only its memory is
gone. Whatever would read that memory raises :class:`ReleasedWeightError` instead of saving or computing with nothing:
``state_dict``, ``torch.save``, pickling, ``copy.deepcopy``, ``.to()`` and eager calls of the modules that own it.
``load_state_dict`` gives the memory back and fills it.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor._compat import is_compiled_function
from kbit_inductor.errors import ReleasedWeightError
from kbit_inductor.logs import logger

log = logger("release")
MEND = "call kbit_inductor.restore_(model) to get dequantized floats back, or load_state_dict() to load the original ones"


def is_released(weight: Tensor) -> bool:
    """Whether the memory of ``weight`` was freed."""
    return weight.numel() > 0 and weight.untyped_storage().nbytes() == 0


def release(weights: Mapping[Tensor, str]) -> None:
    """Free the memory of ``weights`` (parameter to layer name) and guard the modules that own them."""
    fresh = {weight: name for weight, name in weights.items() if not is_released(weight)}
    if not fresh:
        return
    for module in _owners(fresh):
        _guard_module(module)
    freed = 0
    for weight, name in fresh.items():
        freed += weight.untyped_storage().nbytes()
        _guard_tensor(weight, name)
        weight.untyped_storage().resize_(0)
    log.info("released %d float weights, %d bytes", len(fresh), freed)


def give_memory(weight: Tensor) -> None:
    """Give a released weight uninitialized memory, to be filled by the caller."""
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    weight.untyped_storage().resize_(int(weight.storage_offset() + last + 1) * weight.element_size())
    for attribute in ("__reduce_ex__", "__deepcopy__"):
        weight.__dict__.pop(attribute, None)


def _owners(weights: Mapping[Tensor, str]) -> Iterator[nn.Module]:
    """Modules that hold one of ``weights``. A graph knows its parameters but not the modules around them; the heap does."""
    wanted = {id(weight) for weight in weights}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module):
            tensors = [
                *candidate.__dict__.get("_parameters", {}).values(),
                *candidate.__dict__.get("_buffers", {}).values(),
            ]
            if any(id(tensor) in wanted for tensor in tensors):
                yield candidate


def _released_names(module: nn.Module) -> list[str]:
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [name for name, tensor in named if is_released(tensor)]


def _refuse(module: nn.Module, action: str) -> None:
    names = _released_names(module)
    if names:
        raise ReleasedWeightError(
            f"{action} of a {type(module).__name__} whose {', '.join(names)} was freed by release_weights=True; {MEND}"
        )


def _guard_module(module: nn.Module) -> None:
    if "_apply" in module.__dict__:
        return
    module.register_state_dict_pre_hook(_before_state_dict)
    module.register_load_state_dict_pre_hook(_before_load)
    module.register_forward_pre_hook(_before_forward)
    weak = weakref.ref(module)
    module.__dict__["_apply"] = functools.partial(_guarded_apply, weak)
    module.__dict__["__getstate__"] = functools.partial(_guarded_state, weak)


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    _refuse(module, "state_dict()")


def _before_forward(module: nn.Module, args: Any) -> None:
    # Inside a compiled graph the packed weight is used. A compiled `forward` is entered through the eager `__call__`.
    if not torch.compiler.is_compiling() and not is_compiled_function(module.__dict__.get("forward")):
        _refuse(module, "eager call")


def _before_load(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    for name in _released_names(module):
        if prefix + name in state_dict:
            give_memory(getattr(module, name))


def _guarded_apply(weak: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    module = weak()
    assert module is not None  # it is being called
    _refuse(module, "to(), or another conversion,")
    converted: nn.Module = type(module)._apply(module, *args, **kwargs)
    return converted


def _guarded_state(weak: weakref.ref[nn.Module]) -> dict[str, Any]:
    module = weak()
    assert module is not None  # it is being pickled or copied
    _refuse(module, "copy or pickling")
    state = dict(module.__dict__)
    del state["_apply"], state["__getstate__"]
    return state


def _guard_tensor(weight: Tensor, name: str) -> None:
    def refuse(*args: Any) -> Any:
        raise ReleasedWeightError(f"copy or pickling of the weight of layer {name!r}, freed by release_weights=True; {MEND}")

    weight.__dict__["__reduce_ex__"] = refuse
    weight.__dict__["__deepcopy__"] = refuse
