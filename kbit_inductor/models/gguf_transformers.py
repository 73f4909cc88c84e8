"""What transformers and gguf know together of a GGUF file: its model, the names and rows of its tensors, and its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from kbit_inductor import huggingface
from kbit_inductor.errors import ModelMismatchError, UnsavableModelError
from kbit_inductor.models.damage import PARSING_ERRORS, check_sizes


@dataclass(frozen=True)
class Form:
    """How a GGUF file has the tensors of an architecture.

    Attributes:
        names: in the model, by those of the file.
        processor: turns a tensor of the file into one of the model.
    """

    names: Mapping[str, str]
    processor: Any

    @classmethod
    def of(cls, model: Any) -> Form:
        """That of a model of transformers with parameters of its own, on the meta device for one.

        Raises:
            ModelMismatchError: GGUF has no such architecture.
        """
        kind = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)
        processor = kind(config=model.config.to_dict())  # type: ignore[no-untyped-call]
        try:
            return cls(get_gguf_hf_weights_map(model, processor), processor)
        except PARSING_ERRORS as error:
            raise ModelMismatchError(f"GGUF has no form of {model.config.model_type!r} that transformers knows: {error}") from error

    def row_order(self, name: str, rows: int) -> Tensor | None:
        """Which rows of the tensor ``name`` of the file those of the model are, int64 ``[rows]``; elements, of a vector.

        llama.cpp interleaves the halves of each head, for one. transformers has a function of values for it: given the numbers of
        the rows, it says which is which. None where the model has the tensor in another form.
        """
        try:
            moved = self.values(name, np.arange(rows, dtype=np.float64)[:, None])
        except PARSING_ERRORS as error:
            raise ModelMismatchError(f"{name} of the file, of {rows} rows, is none of the model ({error})") from error
        if moved.shape != (rows, 1) or not np.array_equal(np.sort(moved[:, 0]), np.arange(rows)):
            return None
        return torch.from_numpy(moved[:, 0].astype(np.int64))

    def values(self, name: str, weights: Any) -> Any:
        """``weights`` of the tensor ``name`` of the file as the model has them."""
        parsed: dict[str, Any] = {"tensors": {}}
        told = {"tensor_key_mapping": self.names, "parsed_parameters": parsed}
        result = self.processor.process(weights=weights, name=name, **told)
        if parsed["tensors"] or result.name != name:
            raise ModelMismatchError(f"{name} of the file is spread over several tensors of the model, which is not supported")
        return result.weights


def skeleton(path: Path, tensors: int) -> nn.Module:
    """The model that a GGUF file of ``tensors`` describes, parameters on the meta device and buffers with values.

    Raises:
        ModelMismatchError: transformers has no such architecture.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        check_sizes(config, tensors, path.stat().st_size, path)
        model: nn.Module = huggingface.without_weights(config, torch.float32)
    except huggingface.CONFIGURATION_ERRORS as error:
        raise ModelMismatchError(f"transformers does not load the architecture of {path.name}: {error}") from error
    return model


def form_and_description(model: nn.Module) -> tuple[Form, str, dict[str, Any]]:
    """How a GGUF file has ``model``, the name of its architecture, and its sizes by their keys in a file.

    Raises:
        ModelMismatchError: it is no model of transformers with such a form.
        UnsavableModelError: its positions are scaled, which takes more than numbers to describe.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in GGUF_CONFIG_MAPPING:
        raise ModelMismatchError(f"a {type(model).__name__} has no form in GGUF that transformers knows")
    config: Any = model.config
    form, architecture = Form.of(huggingface.without_weights(config, torch.float32)), config.model_type
    positions = getattr(config, "rope_parameters", None) or {}
    if positions.get("rope_type", "default") != "default":
        raise UnsavableModelError(f"the positions of the model are scaled by {positions['rope_type']!r}, which is not written")
    found = {**config.to_dict(), **positions}
    names: Any = GGUF_CONFIG_MAPPING[architecture]
    keys = {key: found.get(name) for key, name in names.items() if name}
    if keys.get("rope.dimension_count", 0) is None:
        keys["rope.dimension_count"] = config.hidden_size // config.num_attention_heads
    numbers = {f"{architecture}.{key}": value for key, value in keys.items() if isinstance(value, (int, float))}
    return form, architecture, numbers
