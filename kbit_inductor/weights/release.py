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
from collections.abc import Iterable, Iterator, Mapping
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


class Owners:
    """The modules around parameters. A graph knows its parameters but not the modules that hold them; the heap does."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def of(self, weights: Iterable[Tensor]) -> list[nn.Module]:
        """The modules that hold one of ``weights``. The heap is searched only when those known from before hold not all."""
        wanted = {id(weight) for weight in weights}
        if not wanted <= self._held_by_known():
            kinds = {id(kind) for kind in _kinds(nn.Module)}  # the heap has millions of objects: asking each is slow
            self._known.update(thing for thing in gc.get_objects() if id(type(thing)) in kinds)
        return [module for module in self._known if any(id(tensor) in wanted for tensor in _held(module))]

    def _held_by_known(self) -> set[int]:
        return {id(tensor) for module in self._known for tensor in _held(module)}


def release(weights: Mapping[Tensor, str], owners: Owners) -> list[Tensor]:
    """Free the memory of ``weights`` (parameter to layer name), guard the modules that own them, and return those freed now.

    A weight lets go of its storage and gets an empty one. So memory that others share, a file's mapping among them, is freed when
    the last of them lets go, and nobody else's tensor changes.
    """
    fresh = {weight: name for weight, name in weights.items() if not is_released(weight)}
    if not fresh:
        return []
    for module in owners.of(fresh):
        _guard_module(module)
    for weight, name in fresh.items():
        _guard_tensor(weight, name)
        weight.data = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
        weight.untyped_storage().resize_(0)
    trim_heap()
    log.info("released %d float weights", len(fresh))
    return list(fresh)


def give_memory(weight: Tensor) -> None:
    """Give a released weight uninitialized memory, to be filled by the caller."""
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    weight.untyped_storage().resize_((last + 1) * weight.element_size())
    for attribute in ("__reduce_ex__", "__deepcopy__"):
        weight.__dict__.pop(attribute, None)


def _kinds(kind: type) -> Iterator[type]:
    """``kind`` and all classes derived from it."""
    yield kind
    found: list[type] = type.__subclasses__(kind)
    for derived in found:
        yield from _kinds(derived)


def _held(module: nn.Module) -> list[Tensor]:
    """The tensors that ``module`` itself holds."""
    tables = (module.__dict__.get("_parameters", {}), module.__dict__.get("_buffers", {}))
    return [tensor for table in tables for tensor in table.values() if isinstance(tensor, Tensor)]


def trim_heap() -> None:
    """Give freed memory back to the system. glibc keeps it otherwise, and the resident size does not fall."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Trimmer:
    """Gives freed memory back to the system now and then, while weights are converted one after the other."""

    EVERY = 1 << 18  # elements

    def __init__(self) -> None:
        self._converted = 0

    def converted(self, elements: int) -> None:
        """So many elements were converted."""
        self._converted += elements
        if self._converted > self.EVERY:
            trim_heap()
            self._converted = 0


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
