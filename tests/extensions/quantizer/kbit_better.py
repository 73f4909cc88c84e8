"""The better of two quantizers, matrix by matrix."""

from kbit_inductor import register_quantizer
from kbit_inductor.quantizers import hqq, rtn


def better_of_two(weight, form, statistics):
    candidates = (rtn(weight, form, statistics), hqq(weight, form, statistics))
    return min(candidates, key=lambda found: found.error)


better = register_quantizer("better", better_of_two)
