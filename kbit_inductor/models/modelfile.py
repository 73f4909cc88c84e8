"""The files of a saved model: what is in ``kbit.json``, and tensors read from and written to safetensors (docs/models.md).

Nothing that is read is run or unpickled. ``kbit.json`` is the one file that names the others, by their contents, and it is replaced
in one step: who reads a folder while it is written, or after a crash, finds the old model or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kbit_inductor.atomic import TEMPORARY, replacing
from kbit_inductor.config import WITHOUT_SIDE, LayerConfig
from kbit_inductor.errors import CorruptModelError, FormatVersionError, InvalidOptionError, NotAModelFolderError
from kbit_inductor.packing import specs_by_name

MANIFEST = "kbit.json"
FORMAT, VERSION = "kbit-inductor model", 1
WITH_SIDE = 2  # the version of a folder with side terms, which readers of the first would leave out
MOST_MANIFEST_BYTES = 64 << 20
FILE_NAME = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64,
    )
}  # fmt: skip
NOT_WHAT_WAS_WRITTEN = (ValueError, KeyError, TypeError, OverflowError, InvalidOptionError)
OPTIONS = ("bits", "group_size", "symmetric", "activation_bits", "codebook", "cascade", *WITHOUT_SIDE)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        file: name of it.
        shape: of the tensor.
        dtype: a name among :data:`DTYPES`.
        sha256: of its bytes, in hexadecimal.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class StoredWeight:
    """A packed matrix.

    Attributes:
        layers: names of the modules that it belongs to; its tensors are named by the first.
        rows: N.
        columns: K.
        dtype: of the float weight.
        error: squared error over squared norm when it was quantized.
        options: those of :class:`LayerConfig` in :data:`OPTIONS`.
        reordered: whether it has its columns in an order of its own, which is one more tensor.
    """

    layers: tuple[str, ...]
    rows: int
    columns: int
    dtype: str
    error: float
    options: Mapping[str, Any]
    reordered: bool = False

    @property
    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of it, by its name after the layer's."""
        return specs_by_name(self.rows, self.columns, self.config, DTYPES[self.dtype], reordered=self.reordered)

    @property
    def config(self) -> LayerConfig:
        """How it is stored. The method that chose the codes is not kept."""
        return LayerConfig(**self.options)

    def described(self) -> dict[str, Any]:
        """It in JSON, as :meth:`parsed` reads it."""
        return {**dataclasses.asdict(self), "layers": list(self.layers), "options": dict(self.options)}

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> StoredWeight:
        """What :meth:`described` wrote.

        Raises:
            CorruptModelError: it is none.
        """
        try:
            return cls._parsed(found)
        except NOT_WHAT_WAS_WRITTEN as error:
            raise CorruptModelError(
                f"a packed weight is described that there cannot be ({type(error).__name__}: {error}); save the model again"
            ) from error

    @classmethod
    def _parsed(cls, found: Mapping[str, Any]) -> StoredWeight:
        layers = tuple(_is(str, name) for name in _is(list, found["layers"]))
        size = (_is(int, found["rows"]), _is(int, found["columns"]))
        given = {"cascade": False, **WITHOUT_SIDE, **found["options"]}  # folders of older releases do not say
        options = {name: given[name] for name in OPTIONS}
        weight = cls(layers, *size, _dtype(found["dtype"]), float(found["error"]), options, found.get("reordered", False))
        if not layers or not isinstance(weight.reordered, bool) or min(size) < 0 or not isinstance(weight.config, LayerConfig):
            raise ValueError(f"the weight of {layers} is {size}")
        return weight


@dataclass(frozen=True)
class Manifest:
    """What ``kbit.json`` holds.

    Attributes:
        weights: packed matrices.
        tensors: all tensors by name: operands of packed matrices, parameters and buffers.
        aliases: further names of tied parameters and buffers, and what each stands for.
        transformers: class and configuration of a model of transformers; None for any other.
    """

    weights: tuple[StoredWeight, ...]
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    transformers: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of ``folder``.

        Raises:
            NotAModelFolderError: there is none.
            FormatVersionError: it was written by another release, which this one does not read.
            CorruptModelError: it is not what :meth:`write` writes.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise NotAModelFolderError(f"{folder} has no {MANIFEST}; give a folder that kbit_inductor.save has written")
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise CorruptModelError(f"{path} is larger than {MOST_MANIFEST_BYTES} bytes, which no model's is")
        damaged = f"{path} is damaged; copy it anew, or save the model again"
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CorruptModelError(f"{damaged} ({error})") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise CorruptModelError(f"{path} does not describe a model; give a folder that kbit_inductor.save has written")
        if found.get("version") not in (VERSION, WITH_SIDE):
            raise FormatVersionError(
                f"{path} has version {found.get('version')!r} of the format, this release reads {VERSION} and {WITH_SIDE}; save it "
                "again with this release, or install the one that wrote it"
            )
        try:
            return cls._parsed(found)
        except CorruptModelError as error:
            raise CorruptModelError(f"{damaged}: {error}") from error
        except NOT_WHAT_WAS_WRITTEN as error:
            raise CorruptModelError(f"{damaged} ({type(error).__name__}: {error})") from error

    @classmethod
    def _parsed(cls, found: Mapping[str, Any]) -> Manifest:
        weights = [StoredWeight.parsed(one) for one in found["weights"]]
        tensors = {}
        for name, one in _is(dict, found["tensors"]).items():
            shape = tuple(_is(int, extent) for extent in _is(list, one["shape"]))
            if FILE_NAME.fullmatch(_is(str, one["file"])) is None:
                raise ValueError(f"tensor {name!r} is in a file of the name {one['file']!r}, which no file of a model has")
            tensors[name] = StoredTensor(one["file"], shape, _dtype(one["dtype"]), _is(str, one["sha256"]))
        aliases = {_is(str, name): _is(str, target) for name, target in _is(dict, found["aliases"]).items()}
        if strange := [target for target in aliases.values() if target not in tensors]:
            raise ValueError(f"there is no tensor {strange[0]!r}")
        described = found["transformers"]
        return cls(tuple(weights), tensors, aliases, None if described is None else _is(dict, described))

    def write(self, folder: Path) -> None:
        """Replace the one in ``folder`` in one step, when all is on the disk."""
        weights = [weight.described() for weight in self.weights]
        has_side = any(weight.config != weight.config.without_side for weight in self.weights)
        version = WITH_SIDE if has_side else VERSION
        found = {"format": FORMAT, "version": version, **dataclasses.asdict(self), "weights": weights}
        text = json.dumps(found, indent=1)
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @property
    def files(self) -> set[str]:
        """Names of the files of tensors."""
        return {tensor.file for tensor in self.tensors.values()}


class Writer:
    """Writes tensors to files of at most ``shard_bytes``, or of one tensor, and notes what is where."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self.tensors: dict[str, StoredTensor] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write ``tensors``, in one file."""
        total = sum(tensor.nbytes for tensor in (*tensors.values(), *self._waiting.values()))
        if self._waiting and total > self._shard_bytes:
            self.flush()
        self._waiting |= {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        hashes = {name: sha256(tensor) for name, tensor in self._waiting.items()}
        together = "".join(f"{name} {digest}\n" for name, digest in hashes.items())
        file = f"weights-{hashlib.sha256(together.encode()).hexdigest()[:16]}.safetensors"
        with replacing(self._folder / file) as temporary:
            try:
                save_file(_unshared(self._waiting), temporary)
            except SafetensorError as error:  # the disk's own errors too: it is full, for one
                raise OSError(f"cannot write {self._folder / file}: {error}") from error
        for name, tensor in self._waiting.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.tensors[name] = StoredTensor(file, tuple(tensor.shape), dtype, hashes[name])
        self._waiting = {}


class Reader:
    """Reads tensors of a folder, memory-mapped: their bytes come from the file when they are first looked at."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._tensors = manifest.tensors

    def read(self, names: Iterator[str] | list[str]) -> dict[str, Tensor]:
        """The tensors ``names``, checked against shape, dtype and hash.

        Raises:
            CorruptModelError: a file is missing or damaged.
        """
        stored = {name: self._stored(name) for name in names}
        found: dict[str, Tensor] = {}
        for file in dict.fromkeys(one.file for one in stored.values()):
            here = [name for name, one in stored.items() if one.file == file]
            # Opened anew each time: the mapping of a file lives as long as any tensor of it, and those read before are to go.
            try:
                with safe_open(self._folder / file, framework="pt") as opened:
                    found |= {name: opened.get_tensor(name) for name in here}
            except (SafetensorError, OSError, ValueError) as error:
                path = self._folder / file
                raise CorruptModelError(f"{path} is damaged or missing ({error}); copy it anew, or save the model again") from error
        for name, tensor in found.items():
            one = stored[name]
            if (tuple(tensor.shape), tensor.dtype) != (one.shape, DTYPES[one.dtype]) or sha256(tensor) != one.sha256:
                raise CorruptModelError(f"tensor {name!r} of {self._folder / one.file} is not what was saved; copy the file anew")
        return found

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CorruptModelError(f"{self._folder} has no tensor {name!r}; save the model again")
        return self._tensors[name]


def sha256(tensor: Tensor) -> str:
    """Of the bytes of ``tensor``, which is on the CPU and contiguous."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool) -> Iterator[None]:
    """Hold the lock of ``folder``: one process writes, or several read."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # network file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_others(folder: Path, manifest: Manifest) -> None:
    """Remove the files of models that were in ``folder`` before, and what a crash has left."""
    for path in folder.iterdir():
        if (FILE_NAME.fullmatch(path.name) and path.name not in manifest.files) or path.name.startswith(TEMPORARY):
            path.unlink(missing_ok=True)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` in memory of their own, as safetensors wants it: a view of a part of another tensor is copied."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        unshared[name] = tensor if whole else tensor.clone()
    return unshared


def _dtype(name: Any) -> str:
    if name not in DTYPES:
        raise ValueError(f"the dtype is {name!r}")
    return str(name)


def _is(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
