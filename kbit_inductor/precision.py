"""How many planes of a cascade are read: changed while a model runs, without compiling or packing anything anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kbit_inductor.errors import InvalidOptionError, NoCascadeError
from kbit_inductor.kernels.layout import MAX_BITS
from kbit_inductor.lowering.registry import cpu_library_problem
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.weights.store import STORE


@contextlib.contextmanager
def precision(bits: int, *modules: nn.Module) -> Iterator[None]:
    """Within the block, read at most the first ``bits`` planes of weights that are cascades (option ``cascade``).

    Without ``modules`` it holds for all that this thread calls. With them it holds for the weights in these modules alone, whoever
    calls them. Of several blocks around one another the lowest ``bits`` of the two kinds counts, and the innermost of one kind.
    Other weights do not change. The block is to be outside of what is compiled: a graph that is compiled already serves every
    precision.

    Args:
        bits: 1 to 8; a cascade of fewer planes is read whole.
        modules: packed by ``quantize_``, or whose weights the backend has packed in an earlier call.

    Raises:
        InvalidOptionError: other ``bits``.
        NoCascadeError: there is none among the weights of ``modules``, or the kernels that read them are not there.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise InvalidOptionError(f"option 'bits' is {bits!r}; give an integer from 1 to {MAX_BITS}")
    if (problem := cpu_library_problem()) is not None:
        raise NoCascadeError(f"only the compiled CPU kernels read the first planes of a weight, and they are not there: {problem}")
    if not modules:
        before = torch.ops.kbit.set_precision_cpu(bits)
        try:
            yield
        finally:
            torch.ops.kbit.set_precision_cpu(before)
        return
    limits = [(weight, torch.ops.kbit.limit_planes_cpu(weight, min(bits, planes))) for weight, planes in cascades(modules)]
    try:
        yield
    finally:
        for weight, limit in limits:
            torch.ops.kbit.limit_planes_cpu(weight, limit)


def cascades(modules: Sequence[nn.Module]) -> list[tuple[Tensor, int]]:
    """The cascades in ``modules``, each once, and how many planes they have.

    Raises:
        NoCascadeError: there is none.
    """
    found: dict[int, tuple[Tensor, int]] = {}
    for module in modules:
        packed = [matrix.packed for matrix in module.modules() if isinstance(matrix, PackedMatrix)]
        packed += [form for weight in module.parameters() for _, form in STORE.packed_forms(weight)]
        found |= {id(one.operands[0]): (one.operands[0], one.config.bits) for one in packed if one.config.cascade}
    if not found:
        raise NoCascadeError(
            "the modules have no weight that is a cascade; pack them with the option cascade=True, and call a compiled model once "
            "before"
        )
    return list(found.values())
