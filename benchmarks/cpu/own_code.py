"""Classes with a code object of their own, so that what is compiled of one contender is apart from all others.

Dynamo keeps what it compiled with a function's code: it tries the entries in order, and runs the function in eager when there are
too many. Contenders of one class would pay for each other's graphs, and the last would not be compiled at all.
"""

from __future__ import annotations

import types
from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def own_code(kind: type[Kind]) -> type[Kind]:
    """A subclass of ``kind`` that does the same by a copy of its ``forward``."""
    forward = kind.forward
    # It has to seem of this file: torch's own code is compiled through one wrapper for all modules.
    code = forward.__code__.replace(co_filename=__file__)
    copy = types.FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    return type(kind.__name__, (kind,), {"forward": copy})
