"""How many multiply–adds of a run are products with a constant weight, whichever operator computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

# Of the operators that torch's own counter knows, those with a side that may be a weight.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_convolution")


class ConstantProducts(TorchDispatchMode):
    """Counts the products that have a side computed from constants alone, by operator and by the names of the constants.

    Args:
        constants: parameters and buffers by name.

    Attributes:
        found: ``(operator, names)`` to multiply–adds.
    """

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = WeakIdKeyDictionary()
        for name, tensor in constants.items():
            self.names.setdefault(tensor, frozenset([name]))
        self.found: Counter[tuple[str, frozenset[str]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, count it if it is a product with a constant, and know its result if it reads nothing but constants."""
        result = func(*args, **(kwargs or {}))
        operands = [tensor for tensor in pytree.tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        known = [self.names.get(tensor) for tensor in operands]
        name = func._schema.name.split("::")[1]
        # The bias of addmm and of convolution is no side of the product.
        sides = known[1:3] if name in ("addmm", "baddbmm") else known[:2]
        constant = frozenset().union(*(names for names in sides if names))
        if constant and (count := _multiply_adds(func, name, args, kwargs or {}, result)):
            self.found[name, constant] += count
        if all(names is not None for names in known) and not func._schema.is_mutable:
            together = frozenset().union(*(names for names in known if names))
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.names[tensor] = together
        return result


def _multiply_adds(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    if name in PRODUCTS:
        return int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)) // 2
    if "grouped_mm" in name:
        return int(args[0].numel() * args[1].shape[-1])
    if name in ("mv", "addmv"):
        return int(args[-2].numel())
    return 0
