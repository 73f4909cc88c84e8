"""The base of all errors for a mistake of the caller, and those that operators raise; kbit_inductor.errors has the others too."""

from __future__ import annotations


class KbitError(Exception):
    """Base of every error that this package raises for a mistake of its caller."""


class WrongDeviceError(KbitError, RuntimeError):
    """A product or look-up whose input is on another device than its packed weight."""


class OperandMismatchError(KbitError, ValueError):
    """Packed operands that are not those of the bits, group size and columns that an operator is called with."""


class OutOfSharedMemoryError(KbitError, RuntimeError):
    """A product of which not even the smallest tile fits in the shared memory and the registers of a GPU."""
