"""Numerical equivalence as a library: what proves our passes, kernels and quantizers right, for those of others.

The checks need no other package. :mod:`kbit_inductor.testing.strategies`, for property tests, needs hypothesis:
``pip install kbit-inductor[testing]``.
"""

from __future__ import annotations

from kbit_inductor.testing.equivalence import assert_equivalent
from kbit_inductor.testing.kernels import check_kernel
from kbit_inductor.testing.oracles import dequantized_copy, relative_error
from kbit_inductor.testing.passes import check_pass
from kbit_inductor.testing.quantizers import check_quantizer
from kbit_inductor.testing.rewriting import Rewritten, rewrite

__all__ = [
    "Rewritten",
    "assert_equivalent",
    "check_kernel",
    "check_pass",
    "check_quantizer",
    "dequantized_copy",
    "relative_error",
    "rewrite",
]
