"""A folder of Hugging Face's, read without running or unpickling anything: objects of JSON, and tensors of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kbit_inductor.errors import CorruptModelError, NotAModelFolderError
from kbit_inductor.models.damage import PARSING_ERRORS

MOST_JSON_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Checkpoint:
    """The tensors of a folder by name. Each is memory-mapped when it is asked for.

    Raises:
        NotAModelFolderError: there is no safetensors file.
        CorruptModelError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self.nbytes = 0
        for file in self._files():
            self.nbytes += file.stat().st_size if file.is_file() else 0
            for name in self._opened(file, lambda opened: list(opened.keys())):
                self._file_of[name] = file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str) -> Tensor:
        """The tensor ``name``."""
        if name not in self._file_of:
            raise CorruptModelError(f"{self.folder} has no tensor {name!r}; copy the folder anew")
        tensor: Tensor = self._opened(self._file_of[name], lambda opened: opened.get_tensor(name))
        return tensor

    def _files(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            names = set(as_kind(dict, read_json(self.folder / INDEX).get("weight_map"), f"weight_map of {INDEX}").values())
            for name in names:
                if not isinstance(name, str) or Path(name).name != name:
                    raise CorruptModelError(f"{self.folder / INDEX} names the file {name!r}, which is none of its folder")
            return [self.folder / name for name in sorted(names)]
        if files := sorted(self.folder.glob("*.safetensors")):
            return files
        raise NotAModelFolderError(
            f"{self.folder} has no safetensors file; pickled files (.bin, .pt) are not read: save the model with safetensors"
        )

    def _opened(self, file: Path, use: Any) -> Any:
        # Opened anew each time: the mapping of a file lives as long as any tensor of it, and those read before are to go.
        try:
            with safe_open(file, framework="pt") as opened:
                return use(opened)
        except (SafetensorError, *PARSING_ERRORS) as error:
            raise CorruptModelError(f"{file} is damaged or missing ({error}); copy it anew") from error


class Layer:
    """The tensors of one layer, by what follows its name.

    Args:
        tensors: of the folder.
        name: of the layer.
        options: what the configuration says of the method.
    """

    def __init__(self, tensors: Checkpoint, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self.options = options
        self._tensors = tensors

    def __contains__(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self._tensors

    def get(self, suffix: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...] | None = None) -> Tensor:
        """The tensor ``suffix``, which must have one of ``dtypes`` and, where one is given, ``shape``.

        Raises:
            CorruptModelError: it is not there, or another one.
        """
        tensor = self._tensors.read(f"{self.name}.{suffix}")
        if tensor.dtype not in dtypes or (shape is not None and tuple(tensor.shape) != shape):
            wanted = f"{'' if shape is None else f'{shape} of '}{' or '.join(str(dtype) for dtype in dtypes)}"
            found = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise CorruptModelError(f"{self.name}.{suffix} is {found} where {wanted} is due; copy the folder anew")
        return tensor

    def option(self, name: str, kind: type, default: Any = None) -> Any:
        """The option ``name`` of the method, which must be a ``kind``."""
        return as_kind(kind, self.options.get(name, default), f"option {name!r} of the quantization")


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``.

    Raises:
        NotAModelFolderError: there is no such file.
        CorruptModelError: it holds no object of JSON, or is larger than any configuration.
    """
    if not path.is_file():
        raise NotAModelFolderError(f"{path.parent} has no {path.name}; give a model's folder")
    if path.stat().st_size > MOST_JSON_BYTES:
        raise CorruptModelError(f"{path} is larger than {MOST_JSON_BYTES} bytes, which no configuration is")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptModelError(f"{path} is damaged ({error}); copy it anew") from error
    return dict(as_kind(dict, found, str(path)))


def as_kind(kind: type, value: Any, what: str) -> Any:
    """``value``, which must be a ``kind``.

    Raises:
        CorruptModelError: it is none.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CorruptModelError(f"{what} is {value!r} where a {kind.__name__} is due; copy the folder anew")
    return value
