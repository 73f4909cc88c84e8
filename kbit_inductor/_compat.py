"""Every use of torch beyond its public API. A test uses each name, so a torch that lacks one is found at once.

Dynamo and Inductor are imported where they are used: together they take longer than torch, and only who compiles needs them.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.compiler import config as compiler_config
from torch.fx.graph_module import _format_import_block
from torch.multiprocessing.reductions import StorageWeakRef
from torch.package import sys_importer  # type: ignore[attr-defined]
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from torch._inductor.utils import InputType

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "StorageWeakRef",
    "below_autograd",
    "cache_tag",
    "compile_package",
    "copy_graph",
    "graph_breaks",
    "hint",
    "import_block",
    "inductor",
    "is_compiled_function",
    "is_transformed",
    "mark_static_input",
    "member_path",
    "no_modes",
    "no_size_asserts",
    "scoped_library",
    "source_name",
    "storage_id",
    "symbolic_shapes",
    "trace",
    "uncompiled",
]

_MEMBER = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")


def storage_id(tensor: Tensor) -> int:
    """The address of a tensor's storage object: equal for views of one storage, also for fake tensors."""
    address: int = tensor.untyped_storage()._cdata
    return address


def is_transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a torch.func transform's wrapper, which has no storage: of many in ``vmap``, or with a tangent."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def no_modes() -> contextlib.AbstractContextManager[Any]:
    """Leave every dispatch mode, so that real tensors can be worked on while a graph is being compiled."""
    return _disable_current_modes()


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Call operators without their autograd kernels, which under ``no_grad`` do nothing, but in Python."""
    return cast("contextlib.AbstractContextManager[Any]", torch._C._AutoDispatchBelowAutograd())


def no_size_asserts() -> contextlib.AbstractContextManager[Any]:
    """Compile without a check of each input's size and strides at each call, for callers that vouch for them."""
    from torch._inductor import config as inductor_config

    return cast("contextlib.AbstractContextManager[Any]", inductor_config.patch(size_asserts=False))


def inductor(graph: fx.GraphModule, inputs: Sequence[InputType], mode: str) -> Callable[..., Any]:
    """Compile ``graph`` as ``torch.compile(mode=mode)`` would. ``inputs`` may be fake tensors of the graph's own fake mode."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode)) or None
    compiled = compile_fx(graph, list(inputs), config_patches=patches)
    _let_go_of_graph(compiled)
    return cast("Callable[..., Any]", compiled)


def _let_go_of_graph(compiled: Any) -> None:
    """AOTAutograd hangs three methods of the graph's module to its result for convenience, which keep every node and its traces."""
    while compiled is not None:
        for name in ("zero_grad", "named_parameters", "named_buffers"):
            vars(compiled).pop(name, None)
        compiled = vars(compiled).get("_torchdynamo_orig_callable")


def scoped_library(namespace: str, kind: str) -> contextlib.AbstractContextManager[torch.library.Library]:
    """A library whose registrations are gone after the block."""
    return cast("contextlib.AbstractContextManager[torch.library.Library]", torch.library._scoped_library(namespace, kind))


def compile_package(program: torch.export.ExportedProgram, path: Path, library: Path) -> None:
    """Compile ``program`` by AOTInductor to the package ``path``, which ends with ``.pt2``, and put the shared ``library`` into it.

    The model's code is linked to it and finds it beside itself, where the package is unpacked. The library must not be named
    ``*.so``, which is how the loader of packages knows the model's code.
    """
    from torch._inductor import aoti_compile_and_package

    # What follows -l. Nothing in the code calls the library by name, and linkers that keep only what is called are told to keep it.
    link = f"c -Wl,--push-state,--no-as-needed -l:{library.name} -Wl,--pop-state -L{shlex.quote(str(library.parent))}"
    configs = {"aot_inductor.custom_op_libs": [f"{link} -Wl,-rpath,$ORIGIN"]}
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    with zipfile.ZipFile(path, "a") as archive:
        (code,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.write(library, PurePosixPath(code).with_name(library.name))


def cache_tag(tag: str) -> contextlib.AbstractContextManager[Any]:
    """Compile with ``tag`` in the keys of Inductor's and AOTAutograd's caches, besides one that the user has set."""
    whole = ":".join(filter(None, (compiler_config.cache_key_tag, tag)))
    return cast("contextlib.AbstractContextManager[Any]", compiler_config.patch(cache_key_tag=whole))  # type: ignore[attr-defined]


def hint(size: torch.SymInt) -> int:
    """The number that a symbolic size has in the call being compiled, without a guard."""
    return int(size.node.hint)


def source_name(placeholder: fx.Node) -> str | None:
    """Where Dynamo took a graph input from, as an expression such as ``L['self']._modules['fc']._parameters['weight']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


def member_path(source: str) -> list[str]:
    """The module path in a source expression: ``["fc", "weight"]``; empty when it is no member of a module."""
    return _MEMBER.findall(source)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that may be edited, with what AOTAutograd reads of the original."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source
    return copied


def mark_static_input(placeholder: fx.Node) -> None:
    """Tell AOTAutograd that this input keeps its address from call to call, so that CUDA graphs need not copy it."""
    placeholder._dynamo_source = None
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def trace(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """``function`` on fake ``inputs`` as an ATen graph, with composite operators taken apart."""
    from torch.fx.experimental.proxy_tensor import make_fx

    modes: Iterator[FakeTensorMode] = (value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with next(modes), symbolic_shapes(), torch.no_grad():
        return make_fx(function)(*inputs)


def symbolic_shapes() -> contextlib.AbstractContextManager[Any]:
    """Run operators on fake tensors as Dynamo does: some (padding, interpolation) take symbolic sizes only by their Python form."""
    return cast("contextlib.AbstractContextManager[Any]", enable_python_dispatcher())


def import_block(names: dict[str, Any]) -> str:
    """The import statements that give the ``names`` which generated code of a graph refers to."""
    return str(_format_import_block(names, sys_importer))


def is_compiled_function(function: object) -> bool:
    """Whether ``function`` was returned by ``torch.compile``."""
    return hasattr(function, "_torchdynamo_orig_callable")


def uncompiled(model: Any) -> Any:
    """The module or function that ``torch.compile`` has wrapped in ``model``, or ``model`` itself."""
    return getattr(model, "_orig_mod", model)


def graph_breaks() -> dict[str, int]:
    """Dynamo's count of graph breaks by reason, since the process began or Dynamo was reset."""
    from torch._dynamo.utils import counters

    return dict(counters["graph_break"])
