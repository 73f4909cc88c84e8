"""``from_pretrained(…, quantization_config=KbitConfig(bits=4))`` and ``save_pretrained``: packed weights in transformers' folders.

Importing this module makes the method ``"kbit"`` known to transformers, which reads no folder of a method that it does not know.
(Registered as any quantizer from outside is: transformers, "Contribute a new quantization method".)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kbit_inductor.config import Config
from kbit_inductor.errors import CorruptModelError, InvalidOptionError, ModelMismatchError
from kbit_inductor.models.modelfile import StoredWeight
from kbit_inductor.models.modules import PackedMatrix
from kbit_inductor.models.saving import packed_matrix, place_of, stored_weight
from kbit_inductor.models.surgery import dequantize_, packed_matrices, packed_module, quantize_
from kbit_inductor.weights.release import trim_heap

METHOD = "kbit"


@register_quantization_config(METHOD)
class KbitConfig(QuantizationConfigMixin):
    """The options of :func:`kbit_inductor.quantize_`, for ``from_pretrained``.

    Args:
        weights: how each packed weight is stored; written by ``save_pretrained``, not by users.
        quant_method: ``"kbit"``, as transformers writes it.
        options: those of :class:`kbit_inductor.Config`.

    Raises:
        UnknownOptionError, InvalidOptionError: an option that does not exist, or a value that it does not take.
    """

    def __init__(self, *, weights: Iterable[Mapping[str, Any]] | None = None, quant_method: str = METHOD, **options: Any) -> None:
        if quant_method != METHOD:
            raise InvalidOptionError(f"option 'quant_method' is {quant_method!r}; it is {METHOD!r} or left out")
        Config.from_options(options)
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' own methods are an enumeration
        self.options = options
        self.weights = None if weights is None else tuple(map(StoredWeight.parsed, weights))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``. Statistics of a calibration are not in it: the codes are chosen."""
        options = copy.deepcopy({name: value for name, value in self.options.items() if name != "calibration"})
        weights = None if self.weights is None else [weight.described() for weight in self.weights]
        return {**options, "quant_method": METHOD, "weights": weights}


@register_quantizer(METHOD)
class KbitQuantizer(HfQuantizer):
    """Packs a model when its floats are loaded, or loads one that was packed without its floats."""

    quantization_config: KbitConfig

    def __init__(self, quantization_config: KbitConfig, **told: Any) -> None:
        super().__init__(quantization_config, **told)
        if self.pre_quantized and quantization_config.weights is None:
            raise CorruptModelError("config.json names the method 'kbit' and describes no packed weights; save the model again")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **told: Any) -> None:
        if not self.pre_quantized:
            return
        for weight in self.quantization_config.weights or ():
            for position, name in enumerate(weight.layers):
                _, _, module = place_of(model, name, weight)
                model.set_submodule(name, _Awaited(module, weight if position == 0 else None))
            _untie(model, weight.layers)
        _check_files(told.get("checkpoint_files") or (), self.quantization_config.weights or ())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **told: Any) -> None:
        if not self.pre_quantized:
            quantize_(model, self.quantization_config.options)
            found = packed_matrices(model)
            self.quantization_config.weights = tuple(stored_weight(matrix, layers) for matrix, layers in found.items())
            return
        for weight in self.quantization_config.weights or ():
            matrix: PackedMatrix | None = None
            for name in weight.layers:
                awaited = model.get_submodule(name)
                if not isinstance(awaited, _Awaited):
                    raise ModelMismatchError(
                        f"layer {name!r} was replaced while the model was loaded; load it by kbit_inductor.load"
                    )
                matrix = matrix or awaited.matrix(name)
                model.set_submodule(name, awaited.packed(matrix))
        trim_heap()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with each tied weight once."""
        further = {f"{name}.weight." for layers in packed_matrices(model).values() for name in layers[1:]}
        tensors = {key: value for key, value in model.state_dict().items() if f"{key.rpartition('.')[0]}." not in further}
        return tensors, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dequantize_(model)
        if dtype is not None:  # a saved configuration has its name
            nn.Module.to(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` may write it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained: gradients pass through packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` takes it."""
        return True


class _Awaited(nn.Module):
    """In the place of a packed layer while its operands are read: buffers of the storage format, on the meta device at first.

    Args:
        module: the layer.
        weight: its weight; None for a further layer of a tied one, whose operands are read once.
    """

    def __init__(self, module: nn.Module, weight: StoredWeight | None) -> None:
        super().__init__()
        self.described = weight
        self.layer = (module,)  # in a tuple, so that its float parameter is none of the model
        self.register_parameter("bias", module._parameters.get("bias"))
        if weight is not None:
            self.weight = nn.Module()
            for name, (shape, dtype) in weight.specs.items():
                self.weight.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

    def matrix(self, name: str) -> PackedMatrix:
        """The weight of layer ``name``, read."""
        if self.described is None:
            raise ModelMismatchError(f"layer {name!r} has no weight of its own in the folder")
        operands = dict(self.weight.named_buffers())
        return packed_matrix(self.described, operands, operands["planes"].device)

    def packed(self, matrix: PackedMatrix) -> nn.Module:
        """The layer on ``matrix``, with the bias that was read."""
        (module,) = self.layer
        module._parameters["bias"] = self._parameters["bias"]
        return packed_module(module, matrix).train(module.training)


def _check_files(files: Iterable[str], weights: Iterable[StoredWeight]) -> None:
    """Whether the operands of all ``weights`` are in ``files``: transformers would make up those that are not."""
    found: set[str] = set()
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                found.update(tensors.keys())
        except SafetensorError as error:
            raise CorruptModelError(f"{file} is damaged, or no file of safetensors ({error}); save the model again") from error
    for weight in weights:
        for name in weight.specs:
            if f"{weight.layers[0]}.weight.{name}" not in found:
                raise CorruptModelError(f"{weight.layers[0]}.weight.{name} is not in the folder; save the model again")


def _untie(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Tell transformers that ``layers`` have no parameters that it should tie: they share a packed weight."""
    names = {f"{layer}.weight" for layer in layers}
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {to: of for to, of in tied.items() if not {to, of} & names}
