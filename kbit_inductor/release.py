"""Freeing the float weights of a packed model, and what becomes of their other uses.

A released parameter keeps its shape, dtype and identity, so guards hold and recompiles find its packed form; only its memory is
gone. Whatever would read that memory raises :class:`ReleasedWeightError` instead of saving or computing with nothing:
``state_dict``, ``torch.save``, pickling, ``copy.deepcopy``, ``.to()`` and eager calls of the modules that own it.
``load_state_dict`` gives the memory back and fills it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kbit_inductor._compat import is_compiled_function, storage_id
from kbit_inductor.errors import ReleasedWeightError
from kbit_inductor.logs import logger

log = logger("release")
MEND = "call kbit_inductor.restore_(model) to get dequantized floats back, or load_state_dict() to load the original ones"


def is_released(weight: Tensor) -> bool:
    """Whether the memory of ``weight`` was freed."""
    return weight.numel() > 0 and weight.untyped_storage().nbytes() == 0


def release(weights: Mapping[Tensor, str]) -> None:
    """Free the memory of ``weights`` (parameter to layer name) and guard the modules that own them.

    Memory that cannot be freed alone stays, and the log says so: memory shared with another tensor, or mapped from a file.
    """
    owners = list(_modules_with_tensors()) if any(not is_released(weight) for weight in weights) else []
    freed = 0
    for weight, name in weights.items():
        if is_released(weight):
            continue
        obstacle = _obstacle(weight, owners)
        if obstacle:
            log.warning("the float weight of %s is not released: %s", name, obstacle)
            continue
        for module, tensors in owners:
            if any(tensor is weight for tensor in tensors):
                _guard_module(module)
        _guard_tensor(weight, name)
        freed += weight.untyped_storage().nbytes()
        weight.untyped_storage().resize_(0)
    if freed:
        _trim_heap()
        log.info("released float weights of %d bytes", freed)


def give_memory(weight: Tensor) -> None:
    """Give a released weight uninitialized memory, to be filled by the caller."""
    weight.untyped_storage().resize_(_extent(weight))
    for attribute in ("__reduce_ex__", "__deepcopy__"):
        weight.__dict__.pop(attribute, None)


def _extent(weight: Tensor) -> int:
    """Bytes from the start of its storage to the end of the last element of ``weight``."""
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return int(weight.storage_offset() + last + 1) * weight.element_size()


def _modules_with_tensors() -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Every module and the tensors it holds. A graph knows its parameters but not the modules around them; the heap does."""
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module):
            held = [*candidate.__dict__.get("_parameters", {}).values(), *candidate.__dict__.get("_buffers", {}).values()]
            tensors = [tensor for tensor in held if isinstance(tensor, Tensor)]
            if tensors:
                yield candidate, tensors


def _obstacle(weight: Tensor, owners: list[tuple[nn.Module, list[Tensor]]]) -> str:
    storage = weight.untyped_storage()
    if not storage.resizable():
        return "its memory is not torch's own (mapped from a file, or of another library)"
    if storage.nbytes() != weight.numel() * weight.element_size():
        return "it is a part of a larger tensor"
    for _, tensors in owners:
        if any(_shares_memory(weight, tensor) for tensor in tensors):
            return "another parameter or buffer shares its memory"
    return ""


def _shares_memory(weight: Tensor, other: Tensor) -> bool:
    has_memory = type(other) in (Tensor, nn.Parameter, nn.Buffer)  # not a lazy parameter, nor a subclass of its own kind
    return other is not weight and has_memory and other.layout == torch.strided and storage_id(weight) == storage_id(other)


def _trim_heap() -> None:
    """Give freed memory back to the system. glibc keeps it otherwise, and the resident size does not fall."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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


def _before_load(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *rest: Any) -> None:
    for name in _released_names(module):
        weight, loaded = getattr(module, name), state_dict.get(prefix + name)
        # Memory is given only to what will fill it: a tensor of another shape is refused, an assigned one brings its own.
        assigned = metadata.get("assign_to_params_buffers", False)
        if isinstance(loaded, Tensor) and loaded.shape == weight.shape and not assigned:
            give_memory(weight)


def _guarded_apply(weak: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    module = weak()
    assert module is not None  # it is being called
    _refuse(module, "to(), or another conversion,")
    converted: nn.Module = type(module)._apply(module, *args, **kwargs)
    return converted


def _guarded_state(weak: weakref.ref[nn.Module]) -> Any:
    """The state of a module to be pickled or copied: what its class says, without the guards."""
    module = weak()
    assert module is not None  # it is being pickled or copied
    _refuse(module, "copy or pickling")
    of_class = getattr(type(module), "__getstate__", None)
    state = of_class(module) if of_class is not None else module.__dict__
    if not isinstance(state, dict):
        return state
    return {name: _without_guards(value) for name, value in state.items() if name not in ("_apply", "__getstate__")}


def _without_guards(value: Any) -> Any:
    """``value``, or a copy without this module's hooks where it is a table of hooks that has any."""
    guards = (_before_state_dict, _before_load, _before_forward)
    if not isinstance(value, dict) or not any(getattr(hook, "hook", hook) in guards for hook in value.values()):
        return value
    return type(value)((key, hook) for key, hook in value.items() if getattr(hook, "hook", hook) not in guards)


def _guard_tensor(weight: Tensor, name: str) -> None:
    def refuse(*args: Any) -> Any:
        raise ReleasedWeightError(f"copy or pickling of the weight of layer {name!r}, freed by release_weights=True; {MEND}")

    weight.__dict__["__reduce_ex__"] = refuse
    weight.__dict__["__deepcopy__"] = refuse
