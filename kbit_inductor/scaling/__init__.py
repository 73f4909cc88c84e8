"""k-bit scaling laws: how the loss of a family of models moves with size and bits, and which bits are best at each size."""

from kbit_inductor.scaling.fit import Choice, Law, fit
from kbit_inductor.scaling.study import Study, scaling
from kbit_inductor.scaling.sweep import Row, sweep

__all__ = ["Choice", "Law", "Row", "Study", "fit", "scaling", "sweep"]
