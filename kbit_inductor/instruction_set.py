"""The check of ``KBIT_ISA``, which names the instruction set that the CPU kernels are to use."""

from __future__ import annotations

import os

import torch

from kbit_inductor.errors import InvalidOptionError
from kbit_inductor.kernels.cpu import compiler
from kbit_inductor.lowering import registry


def check_instruction_set() -> None:
    """Does nothing where ``KBIT_ISA`` is not set, or empty.

    Raises:
        InvalidOptionError: it names none of this architecture, or one that this machine does not have.
    """
    wanted = os.environ.get("KBIT_ISA", "")
    known = compiler.instruction_sets()
    if not wanted:
        return
    if wanted not in known:
        raise InvalidOptionError(f"KBIT_ISA is {wanted!r}, which is no instruction set; it can be {', '.join(known)}")
    if registry.cpu_library_problem() is None and wanted not in (usable := torch.ops.kbit.isas_cpu()):
        raise InvalidOptionError(f"KBIT_ISA is {wanted!r}, which this machine does not have; it can be {', '.join(usable)}")
