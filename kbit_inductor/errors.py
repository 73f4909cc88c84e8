"""One exception class per mistake. Every message names the layer or option, says what was wrong and what to do."""

from __future__ import annotations

from kbit_inductor.lowering.errors import KbitError as KbitError
from kbit_inductor.lowering.errors import OperandMismatchError as OperandMismatchError
from kbit_inductor.lowering.errors import WrongDeviceError as WrongDeviceError


class UnknownOptionError(KbitError, TypeError):
    """An option that does not exist."""


class InvalidOptionError(KbitError, ValueError):
    """An option with a value outside its range or of the wrong type."""


class UnmatchedOverrideError(KbitError, ValueError):
    """An entry of ``overrides`` or ``skip`` that names no layer of the model."""


class NonFiniteWeightError(KbitError, ValueError):
    """A weight that holds NaN or an infinity, so no grid of codes can hold it."""


class UnsupportedDtypeError(KbitError, TypeError):
    """A weight whose dtype cannot be quantized."""


class UnsupportedShapeError(KbitError, ValueError):
    """A weight that is neither a matrix nor a batch of matrices."""


class InvalidPassError(KbitError, ValueError):
    """A pass of an unknown tier or of a name that is taken, or one that returns another graph in place of editing its own."""


class PassOrderError(KbitError, ValueError):
    """Constraints on the order of passes that form a circle, or that name a pass that does not exist."""


class BrokenPassError(KbitError, AssertionError):
    """A pass that, under ``debug``, was seen to break a graph or the promise of its tier.

    Attributes:
        broken: the name of the pass.
    """

    def __init__(self, broken: str, message: str) -> None:
        super().__init__(f"pass {broken!r} {message}")
        self.broken = broken


class MissingPackageError(KbitError, ImportError):
    """A package that only a part of this one needs, and that is not installed."""


class NotATuningTableError(KbitError, ValueError):
    """A file to import measured times from that is not there, or is none of its format."""


class InvalidKernelError(KbitError, ValueError):
    """A kernel of a name that is taken, or without the operators that its record names."""


class BudgetError(KbitError, ValueError):
    """A budget for ``bits="auto"`` that even the least bits exceed."""


class EmptyCalibrationError(KbitError, ValueError):
    """Calibration data without a batch, or that gives no layer a row."""


class NonFiniteActivationError(KbitError, ValueError):
    """Calibration data on which a layer is given NaN or an infinity."""


class ReleasedWeightError(KbitError, RuntimeError):
    """A use of float weights that ``release_weights=True`` has freed."""


class NoCascadeError(KbitError, ValueError):
    """A precision for weights of which none has planes that can be read alone."""


class NotAModelFolderError(KbitError, FileNotFoundError):
    """A folder to load from that holds no saved model, or a file where a folder is to be."""


class NotAModelFileError(KbitError, ValueError):
    """A file to import that is not there, or is none of its format."""


class UnsupportedFormatError(KbitError, ValueError):
    """A model to import in a format, or a variant of one, that is not read."""


class FormatVersionError(KbitError, ValueError):
    """A saved model of a version of the format that this release does not read."""


class CorruptModelError(KbitError, ValueError):
    """Files of a saved model that are damaged, incomplete, or not what they say."""


class ModelMismatchError(KbitError, ValueError):
    """A model to load into that is not the one that was saved."""


class UnsavableModelError(KbitError, ValueError):
    """A model with a tensor that has no values, or that no file can hold."""


class ModelCallError(KbitError, RuntimeError):
    """A model whose call fails on the inputs that it is to be explained, exported or timed with."""


class UnexportableModelError(KbitError, ValueError):
    """A model to export without a packed weight, or with a kernel that is not there without Python."""


class NotACausalLMError(KbitError, TypeError):
    """A model for :class:`kbit_inductor.Generator` that is no causal language model of transformers with a head."""


class UncapturableModelError(KbitError, RuntimeError):
    """A model that cannot be captured as one graph for every size that calls may have."""


class TrainingModeError(KbitError, RuntimeError):
    """Generating with, or exporting, a model in training mode."""


class InvalidPromptError(KbitError, ValueError):
    """A prompt of the wrong shape, dtype or batch size, or with tokens outside of the vocabulary."""


class EmptyPromptError(KbitError, ValueError):
    """A prompt without a token."""


class PromptTooLongError(KbitError, ValueError):
    """A prompt that leaves no room for a new token."""


class InvalidPaddingError(KbitError, ValueError):
    """An ``attention_mask`` that does not say how many tokens on the left of each row are padding."""


class TooManyTokensError(KbitError, ValueError):
    """More new tokens than the generator has room for, or fewer than one."""


class InvalidSamplingError(KbitError, ValueError):
    """A value that ``temperature``, ``top_k``, ``top_p``, ``seed`` or ``eos_token_id`` does not take."""


class InterruptedStreamError(KbitError, RuntimeError):
    """Asking a stream for more after its generator has begun another text."""
