"""The work of a kernel as sympy expressions in the sizes of a product and in how it is cut.

An expression may hold any of :data:`SYMBOLS`. A kernel's work is written once, with all of them, and bound to a weight and a
configuration by :meth:`Work.at`; what is left is ``M``, the rows of x, which may be many numbers at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import sympy
from numpy.typing import ArrayLike

SYMBOLS = M, N, K, BITS, GROUP = sympy.symbols("M N K bits group", positive=True)
"""Rows of x; rows and columns of the weight; bits of a code; columns of a group."""

Expression: TypeAlias = "sympy.Expr | int | float"
UNHIDDEN = 1 / 8
"""Of a kernel that unpacks between loading and multiplying. Published rows of such kernels on an H200 lie between 0 and 1/3, those
of cuBLAS at 0 (tests/test_cost_model.py)."""


class Quantities(NamedTuple):
    """A kernel's work in numbers, each an array over M: the fields of :class:`Work`."""

    bytes: Any
    l2_bytes: Any
    instructions: Any
    products: Any
    launches: Any
    programs: Any
    resident: Any
    warps: Any
    in_flight: Any


@dataclass(frozen=True)
class Work:
    """What a kernel does for one product.

    Attributes:
        bytes: read from and written to memory.
        l2_bytes: read from and written to the L2 cache, those of memory among them. 0: no bound.
        instructions: executed, one for each thread counted.
        products: operations of the matrix units, a product and a sum being two, those on padding among them.
        launches: kernels, one after the other.
        programs: thread blocks. 0: enough to fill the device, so that there is no tail.
        resident: programs that a multiprocessor holds at once (occupancy).
        warps: of a program.
        in_flight: bytes that a program has asked memory for and not received. 0: enough.
        unhidden: share of the time of what is not the bound that is not hidden behind it, see :data:`UNHIDDEN`.
        way: how it is done, where a kernel has several ways and chooses by M.
        values: numbers for symbols, by name.
        then: the work of a kernel that begins when this one has ended.
    """

    bytes: Expression
    l2_bytes: Expression = 0
    instructions: Expression = 0
    products: Expression = 0
    launches: Expression = 1
    programs: Expression = 0
    resident: Expression = 1
    warps: Expression = 8
    in_flight: Expression = 0
    unhidden: float = UNHIDDEN
    way: str = ""
    values: tuple[tuple[str, float], ...] = ()
    then: Work | None = None

    def at(self, **values: float) -> Work:
        """This work with numbers for more symbols. None is substituted, so this takes no time."""
        then = None if self.then is None else self.then.at(**values)
        return dataclasses.replace(self, values=tuple({**dict(self.values), **values}.items()), then=then)

    def expressions(self) -> dict[str, sympy.Expr]:
        """The expressions by name, with the numbers substituted: for people."""
        substitutions = [(symbol, dict(self.values)[symbol.name]) for symbol in self._symbols() if symbol.name in dict(self.values)]
        return {name: sympy.sympify(getattr(self, name)).subs(substitutions) for name in Quantities._fields}

    def quantities(self, m: ArrayLike) -> Quantities:
        """The numbers for ``m`` rows of x, one or an array of them.

        Raises:
            KeyError: a symbol other than M that has no number.
        """
        symbols = tuple(sorted((symbol for symbol in self._symbols() if symbol != M), key=lambda symbol: symbol.name))
        values, m = dict(self.values), np.asarray(m, dtype=np.float64)
        found = _compiled(self._expressions(), symbols)(m, *(values[symbol.name] for symbol in symbols))
        return Quantities(*(np.broadcast_to(np.asarray(value, dtype=np.float64), m.shape) for value in found))

    def _expressions(self) -> tuple[Expression, ...]:
        return tuple(getattr(self, name) for name in Quantities._fields)

    def _symbols(self) -> frozenset[sympy.Symbol]:
        return _symbols(self._expressions())


@functools.cache
def _symbols(expressions: tuple[Expression, ...]) -> frozenset[sympy.Symbol]:
    return frozenset().union(*(sympy.sympify(expression).free_symbols for expression in expressions))


@functools.cache
def _compiled(expressions: tuple[Expression, ...], symbols: tuple[sympy.Symbol, ...]) -> Callable[..., Any]:
    """The expressions as one function of numpy arrays: a thousand times as fast as substituting."""
    return sympy.lambdify([M, *symbols], list(expressions), modules="numpy", cse=True)  # type: ignore[no-any-return]
