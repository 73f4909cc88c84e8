"""A ``torch.compile`` backend for k-bit inference.

``torch.compile(model, backend="kbit")`` needs no import of this package: the backend is found through its entry point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kbit_inductor.backend import kbit
from kbit_inductor.bits import Plan, PlannedLayer, plan
from kbit_inductor.calibrating.calibrate import calibrate
from kbit_inductor.calibrating.channel_scaling import ChannelScaling, ScaledLayers, scale_channels_
from kbit_inductor.calibrating.learned_codebooks import learn_codebooks
from kbit_inductor.calibrating.own_text import own_text
from kbit_inductor.calibration import Calibration
from kbit_inductor.config import Config, LayerConfig
from kbit_inductor.debug.bisect import Culprit, bisect
from kbit_inductor.errors import (
    BrokenPassError,
    BudgetError,
    CorruptModelError,
    EmptyCalibrationError,
    EmptyPromptError,
    FormatVersionError,
    InterruptedStreamError,
    InvalidKernelError,
    InvalidOptionError,
    InvalidPaddingError,
    InvalidPassError,
    InvalidPromptError,
    InvalidSamplingError,
    KbitError,
    MissingPackageError,
    ModelCallError,
    ModelMismatchError,
    NoCascadeError,
    NonFiniteActivationError,
    NonFiniteWeightError,
    NotACausalLMError,
    NotAModelFileError,
    NotAModelFolderError,
    NotATuningTableError,
    OperandMismatchError,
    PassOrderError,
    PromptTooLongError,
    ReleasedWeightError,
    TooManyTokensError,
    TrainingModeError,
    UncapturableModelError,
    UnexportableModelError,
    UnknownOptionError,
    UnmatchedOverrideError,
    UnsavableModelError,
    UnsupportedDtypeError,
    UnsupportedFormatError,
    UnsupportedShapeError,
    WrongDeviceError,
)
from kbit_inductor.generation.custom_generate import custom_generate
from kbit_inductor.generation.generator import Generator, generate
from kbit_inductor.generation.speculative import SpeculativeGenerator
from kbit_inductor.kernel_registry import register_kernel
from kbit_inductor.lora import init_lora_
from kbit_inductor.models.exporters.gguf import to_gguf
from kbit_inductor.models.exporters.gptq import to_gptq
from kbit_inductor.models.gguf_model import from_gguf
from kbit_inductor.models.importers.checkpoint import from_checkpoint
from kbit_inductor.models.importers.onnx import from_onnx
from kbit_inductor.models.importers.pt2e import from_pt2e
from kbit_inductor.models.importers.torchao import from_torchao
from kbit_inductor.models.package import export
from kbit_inductor.models.saving import load, save
from kbit_inductor.models.surgery import dequantize_, quantize_
from kbit_inductor.passes.record import Pass
from kbit_inductor.passes.registry import register_pass
from kbit_inductor.precision import precision
from kbit_inductor.quantizers import register_quantizer
from kbit_inductor.reports.explain import Explanation, explain
from kbit_inductor.reports.findings import LayerReport
from kbit_inductor.scaling import scaling
from kbit_inductor.weights.restore import restore_

if TYPE_CHECKING:
    from kbit_inductor.pretrained import KbitConfig

__version__ = "0.1.0"

__all__ = [
    "BrokenPassError",
    "BudgetError",
    "Calibration",
    "ChannelScaling",
    "Config",
    "CorruptModelError",
    "Culprit",
    "EmptyCalibrationError",
    "EmptyPromptError",
    "Explanation",
    "FormatVersionError",
    "Generator",
    "InterruptedStreamError",
    "InvalidKernelError",
    "InvalidOptionError",
    "InvalidPaddingError",
    "InvalidPassError",
    "InvalidPromptError",
    "InvalidSamplingError",
    "KbitConfig",
    "KbitError",
    "LayerConfig",
    "LayerReport",
    "MissingPackageError",
    "ModelCallError",
    "ModelMismatchError",
    "NoCascadeError",
    "NonFiniteActivationError",
    "NonFiniteWeightError",
    "NotACausalLMError",
    "NotAModelFileError",
    "NotAModelFolderError",
    "NotATuningTableError",
    "OperandMismatchError",
    "Pass",
    "PassOrderError",
    "Plan",
    "PlannedLayer",
    "PromptTooLongError",
    "ReleasedWeightError",
    "ScaledLayers",
    "SpeculativeGenerator",
    "TooManyTokensError",
    "TrainingModeError",
    "UncapturableModelError",
    "UnexportableModelError",
    "UnknownOptionError",
    "UnmatchedOverrideError",
    "UnsavableModelError",
    "UnsupportedDtypeError",
    "UnsupportedFormatError",
    "UnsupportedShapeError",
    "WrongDeviceError",
    "bisect",
    "calibrate",
    "custom_generate",
    "dequantize_",
    "explain",
    "export",
    "from_checkpoint",
    "from_gguf",
    "from_onnx",
    "from_pt2e",
    "from_torchao",
    "generate",
    "init_lora_",
    "kbit",
    "learn_codebooks",
    "load",
    "own_text",
    "plan",
    "precision",
    "quantize_",
    "register_kernel",
    "register_pass",
    "register_quantizer",
    "restore_",
    "save",
    "scale_channels_",
    "scaling",
    "to_gguf",
    "to_gptq",
]


def __getattr__(name: str) -> Any:
    """``KbitConfig``, when it is first asked for: it imports transformers, which nothing else here needs."""
    if name == "KbitConfig":
        from kbit_inductor.pretrained import KbitConfig

        return KbitConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
