"""A packed model as one file that runs without Python: torch.export, then AOTInductor, with the kernels' library in the package.

The kernels are the operators ``kbit::fused_linear_cpu`` and ``kbit::embedding_cpu``, which AOTInductor calls by name. The model's
code is linked to their library, so the dynamic linker loads it first, once for all packages of a process.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kbit_inductor import logs
from kbit_inductor._compat import compile_package, uncompiled
from kbit_inductor.capture import VALUE, Context
from kbit_inductor.config import Config
from kbit_inductor.errors import (
    InvalidOptionError,
    ModelCallError,
    TrainingModeError,
    UncapturableModelError,
    UnexportableModelError,
)
from kbit_inductor.kernels.cpu import build, compiler
from kbit_inductor.models.surgery import packed_matrices
from kbit_inductor.passes.fuse import fuse

log = logs.logger("passes")
SUFFIX = "_cpu"  # of the operators that are C++ altogether


@torch.no_grad()
def export(model: nn.Module, example: Tensor | Sequence[Any] | Mapping[str, Any], path: str | Path, *, dynamic: Any = None) -> Path:
    """Compile ``model`` to the package ``path`` for AOTInductor.

    The package holds the packed weights as they are in memory and no floats of them, and the library of the kernels. It runs where
    this version of torch is: in C++ by ``AOTIModelPackageLoader``, in Python by ``torch._inductor.aoti_load_package``. Inductor
    compiles what is around the products for the instruction set of this machine; the kernels choose theirs where they run.

    Args:
        model: packed by :func:`quantize_`, on the CPU, in ``eval()``. It must be one that ``torch.export`` takes.
        example: arguments for one call: a tensor, a sequence of positional ones, or a mapping of keyword ones. What is no tensor is
            fixed, ``use_cache=False`` for one.
        path: ends with ``.pt2``. A package that is there is replaced in one step.
        dynamic: which sizes may differ from the example's, as ``dynamic_shapes`` of ``torch.export.export``. None for the first of
            every tensor, the batch, and the second of integer matrices, the length of a text. Each of these is at least 2 in the
            example; calls may have fewer.

    Returns:
        ``path``.

    Raises:
        InvalidOptionError: ``path`` does not end with ``.pt2``, or the example is of size 1 or 0 where calls may differ.
        TrainingModeError: a model in training mode.
        UnexportableModelError: no weight is packed, or one has a kernel that is not C++; with torch 2.11, a packed embedding.
        ModelCallError: the model itself fails on ``example``.
        UncapturableModelError: ``torch.export`` does not take the model, or not with these sizes dynamic.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise InvalidOptionError(f"a package is a file of the name *.pt2, not {path.name!r}")
    model = uncompiled(model)
    if model.training:
        raise TrainingModeError("the model is in training mode; call model.eval() before it is exported")
    logs.configure()
    _check_kernels(model)
    arguments, keywords = _call_of(example)
    program = _captured(model, arguments, keywords, dynamic)
    log.info("fused into products: %s", dict(fuse_program(program)))
    _check_dtypes(program)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".package-", dir=path.parent) as scratch:
        package = Path(scratch) / path.name
        library = shutil.copy(build.build(), Path(scratch) / compiler.loaded_name(compiler.stamp(compiler.sources())))
        compile_package(program, package, Path(library))
        package.replace(path)
    return path


def _check_kernels(model: nn.Module) -> None:
    matrices = packed_matrices(model)
    if not matrices:
        raise UnexportableModelError("the model has no packed weight; call kbit_inductor.quantize_ before it is exported")
    for matrix, names in matrices.items():
        if matrix.suffix != SUFFIX:
            reasons = "; ".join(f"{kernel} {reason}" for kernel, reason in matrix.rejected)
            raise UnexportableModelError(f"layer {names[0]!r} has the kernel {matrix.kernel!r}, which is not C++ ({reasons})")


def _check_dtypes(program: torch.export.ExportedProgram) -> None:
    """Packages of torch 2.11 call operators with other dtypes than they were compiled with (mended by PyTorch's #173562)."""
    if torch.__version__ < "2.12" and program.graph.find_nodes(op="call_function", target=torch.ops.kbit.embedding_cpu.default):
        raise UnexportableModelError(
            "packages of torch 2.11 mistake the dtypes of operators, and look-ups in packed embeddings have one; take torch 2.12 "
            "or later, or leave embeddings in float by the option 'skip'"
        )


def _call_of(example: Tensor | Sequence[Any] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return ((example,) if isinstance(example, Tensor) else tuple(example)), {}


def _captured(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], dynamic: Any) -> torch.export.ExportedProgram:
    try:
        model(*arguments, **keywords)
    except Exception as error:
        raise ModelCallError(f"the model cannot be exported since its call failed: {error}") from error
    if dynamic is None:
        dynamic = pytree.tree_map(_sizes_that_differ, tuple(keywords.values()) if keywords else arguments)
        dynamic = dict(zip(keywords, dynamic, strict=True)) if keywords else dynamic
    try:
        return torch.export.export(model, arguments, keywords, dynamic_shapes=dynamic)
    except Exception as error:  # torch.export has no class for all that it refuses
        raise UncapturableModelError(
            f"torch.export does not take {type(model).__name__} ({type(error).__name__}, see above); make it exportable, or tell "
            "by 'dynamic' which sizes are fixed"
        ) from error


def fuse_program(program: torch.export.ExportedProgram) -> Counter[str]:
    """Fuse what surrounds the products of ``program`` into them, in place, as ``backend="kbit"`` does; how often, by kind."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # reads what a fusion would move, and checks casts alone
            graph.erase_node(node)
        elif isinstance(value := node.meta.get("val"), Tensor):
            node.meta[VALUE] = value
    context = Context(graph, Config(), [])
    fuse(context)
    for node in graph.nodes:
        if VALUE in node.meta:
            node.meta["val"] = node.meta[VALUE]
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return context.fusions


def _sizes_that_differ(value: Any) -> Any:
    """``dynamic_shapes`` of one argument: the batch, and the length of a text."""
    if not isinstance(value, Tensor):
        return None
    sizes = value.shape[: 2 if value.dim() == 2 and not value.is_floating_point() else 1]
    if min(sizes, default=2) < 2:
        raise InvalidOptionError(f"an example of sizes {tuple(value.shape)} says too little: give at least 2 each, or 'dynamic'")
    return dict.fromkeys(range(len(sizes)), torch.export.Dim.DYNAMIC)
