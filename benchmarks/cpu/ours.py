"""Our own contenders: the compiled module, as users have it, and the operator that its graph calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpu.contender import Contender, Copy
from cpu.own_code import own_code
from cpu.timing import Call
from kbit_inductor import LayerConfig
from kbit_inductor.kernels.cpu import build
from kbit_inductor.packing import pack
from kbit_inductor.weights.store import STORE

GROUP = 128
ACTIVATION_BITS = 8  # what the compiled module takes on a CPU by default


def operator_copy(bits: int, weight: Tensor, activation_bits: int = ACTIVATION_BITS, dtype: torch.dtype = torch.float32) -> Copy:
    """A packed copy of ``weight [N, K]`` for x of ``dtype``: the one place that knows the operator and its operands."""
    packed = pack(weight, LayerConfig(bits=bits, group_size=GROUP), layout="tiled")
    (operand,) = packed.operands
    rest = None, 0.0, [operand], [None], [weight.size(0)], "", False, None, activation_bits
    return Copy(packed.nbytes, lambda x: partial(torch.ops.kbit.fused_linear_cpu.default, x.to(dtype), *rest))


def _operator(bits: int, weight: Tensor, **how: Any) -> partial[Copy]:
    build.load()
    # Each copy is packed anew, not cloned: the packed memory is allocated in a way of its own.
    return partial(operator_copy, bits, weight, **how)


def _compiled(bits: int, weight: Tensor) -> partial[Copy]:
    return partial(_compiled_copy, own_code(nn.Linear), bits, weight)


def _compiled_copy(kind: type[nn.Linear], bits: int, weight: Tensor) -> Copy:
    layer = nn.utils.skip_init(kind, weight.size(1), weight.size(0), bias=False).requires_grad_(False)
    layer.weight.copy_(weight)
    options: dict[str, Any] = {"bits": bits, "end_bits": 1, "group_size": GROUP, "min_elements": 0, "release_weights": True}
    module = torch.compile(layer, backend="kbit", options=options, dynamic=False)
    module(weight.new_zeros(1, weight.size(1)))  # packs
    if not (forms := STORE.packed_forms(layer.weight)):
        raise RuntimeError("the layer was not packed")
    return Copy(sum(form.nbytes for _, form in forms), partial(_warm, module))


def _warm(module: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    module(x)  # compiles for this number of rows
    return partial(module, x)


def contenders(bits: range = range(1, 9)) -> list[Contender]:
    """The operator and the compiled module at each number of bits.

    And the operator on activations of 16 bits at 8 and 4: of float32 and, as a peer in bfloat16 has them, of bfloat16.
    """
    ways = {"kbit operator": _operator, "kbit": _compiled}
    found = [Contender(f"{name} {k}", k, partial(way, k), name) for name, way in ways.items() for k in reversed(bits)]
    exact = {"kbit operator, 16-bit x": torch.float32, "kbit operator, bfloat16 x": torch.bfloat16}
    return found + [
        Contender(f"{name} {k}", k, partial(_operator, k, activation_bits=16, dtype=dtype), name)
        for name, dtype in exact.items()
        for k in (8, 4)
        if k in bits
    ]


def instruction_set() -> str:
    """What the kernels run with on this machine."""
    build.load()
    return str(torch.ops.kbit.isa_cpu())
