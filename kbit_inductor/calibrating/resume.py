"""A folder of codes that were learned, so that what was interrupted goes on where it was.

Each file holds the layers that were learned together, and a key: a digest of all that their codes come from, and of the key before.
A file with another key is of another model, other data or other options, and is written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kbit_inductor.atomic import replacing
from kbit_inductor.config import LayerConfig
from kbit_inductor.errors import CorruptModelError
from kbit_inductor.quantizers import Format, Learned, Quantized, Statistics

OPERANDS = ("planes", "scale", "offset", "global_scale")


@dataclass(frozen=True)
class ToLearn:
    """A layer whose codes are to be learned.

    Attributes:
        weight: its parameter ``[N, K]``.
        config: how it is stored.
        statistics: of what it is given.
        key: the name of the parameter in its block.
    """

    weight: Tensor
    config: LayerConfig
    statistics: Statistics
    key: str

    @property
    def format(self) -> Format:
        """Of the codes."""
        return self.config.format(self.weight.size(1))


class Resume:
    """Codes of one run after the other, in the order in which they are learned.

    Args:
        folder: where files are, made if need be; None to keep nothing.
        seed: what else the codes depend on, as text.
    """

    def __init__(self, folder: Path | None, seed: str) -> None:
        self._folder, self._key, self._count = folder, hashlib.sha256(seed.encode()).hexdigest(), 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def next(self, layers: Mapping[str, ToLearn]) -> dict[str, Learned] | None:
        """What was kept of ``layers``, which come next; None where nothing was.

        Raises:
            CorruptModelError: the file cannot be read.
        """
        self._count += 1
        self._key = _digest(self._key, layers) if self._folder is not None else self._key
        path = self._path
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                errors = json.loads(metadata["errors"])
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
            return {name: _learned(name, layer.format, found, errors[name]) for name, layer in layers.items()}
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise CorruptModelError(f"{path} is damaged; remove it, and its codes are learned anew") from error

    def keep(self, learned: Mapping[str, Learned]) -> None:
        """Keep the codes of the layers that :meth:`next` was last asked for."""
        path = self._path
        if path is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, each in learned.items():
            found = each.quantized
            operands = zip(OPERANDS, (each.planes, found.scale, found.offset, found.global_scale), strict=True)
            tensors |= {f"{name}.{key}": tensor.contiguous().cpu() for key, tensor in operands if tensor is not None}
        errors = {name: each.quantized.error for name, each in learned.items()}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"key": self._key, "errors": json.dumps(errors)})

    @property
    def _path(self) -> Path | None:
        return None if self._folder is None else self._folder / f"{self._count:05}.safetensors"


def _digest(before: str, layers: Mapping[str, ToLearn]) -> str:
    made = hashlib.sha256(before.encode())
    for name, layer in layers.items():
        weight, statistics = layer.weight, layer.statistics
        made.update(f"{name} {layer.format} {tuple(weight.shape)} {weight.dtype} {statistics.rows}".encode())
        for tensor in (weight, statistics.mean_square):
            made.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def _learned(name: str, form: Format, found: Mapping[str, Any], error: float) -> Learned:
    planes, scale, offset, global_scale = (found.get(f"{name}.{key}") for key in OPERANDS)
    if planes is None or scale is None or global_scale is None:
        raise KeyError(name)
    none = torch.empty(0, 0, dtype=torch.uint8)
    return Learned(form, planes, Quantized(none, scale, offset, global_scale, error))
