"""Models and tokenizers from folders and files, and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from kbit_inductor.atomic import exchange
from kbit_inductor.errors import InvalidOptionError, NotAModelFolderError
from kbit_inductor.logs import logger
from kbit_inductor.models.gguf_model import from_gguf
from kbit_inductor.models.importers.checkpoint import from_checkpoint, is_packed
from kbit_inductor.models.modelfile import MANIFEST
from kbit_inductor.models.saving import load
from kbit_inductor.packages import need

log = logger("capture")


def open_model(source: Path) -> nn.Module:
    """The causal language model in ``source``: a folder of ``kbit``, one of Hugging Face, packed by others or not, or a GGUF file.

    Raises:
        NotAModelFolderError: it is none of these.
        MissingPackageError: what reads it is not installed.
    """
    need("transformers")
    _check_there(source)
    if (source / MANIFEST).is_file():
        return load(source)
    if source.suffix == ".gguf":
        need("gguf")
        need("accelerate")
        return from_gguf(source)
    if not (source / "config.json").is_file():
        raise NotAModelFolderError(f"{source} has neither {MANIFEST} nor config.json; give a model's folder, or a .gguf file")
    if is_packed(source):
        need("accelerate")
        return from_checkpoint(source)
    import transformers

    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise NotAModelFolderError(f"{source} does not load as a causal language model of transformers: {error}") from error
    return model.eval()


def open_tokenizer(source: Path) -> Any:
    """The tokenizer of the model in ``source``, or None where there is none.

    Raises:
        NotAModelFolderError: there is nothing of that name.
    """
    need("transformers")
    _check_there(source)
    import transformers

    try:
        if source.suffix == ".gguf":
            return transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s has no tokenizer that transformers reads: %s", source, error)
        return None


def text_of(path: Path) -> str:
    """The text in ``path``.

    Raises:
        InvalidOptionError: it is not there, or no text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOptionError(f"{path} is not a text file in UTF-8 that can be read ({error}); give another") from error


def _check_there(source: Path) -> None:
    if not source.exists():
        raise NotAModelFolderError(f"{source} is not there; give a folder that kbit or Hugging Face has written, or a .gguf file")


def check_new(target: Path, force: bool) -> None:
    """Raise InvalidOptionError where ``target`` is there already, and ``force`` is not given."""
    if target.exists() and not force:
        raise InvalidOptionError(f"{target} is there already; give another name, or --force to replace it")


def need_tokenizer(source: Path) -> Any:
    """The tokenizer of the model in ``source``.

    Raises:
        InvalidOptionError: there is none.
    """
    tokenizer = open_tokenizer(source)
    if tokenizer is None:
        raise InvalidOptionError(f"{source} has no tokenizer; put one there by tokenizer.save_pretrained")
    return tokenizer


@contextlib.contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A folder to write to, which is ``target`` once all is written, and is gone when anything fails or is interrupted.

    Raises:
        InvalidOptionError: ``target`` is there already, and ``force`` is not given.
    """
    check_new(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    """Put ``folder`` in the place of ``target``, which stays as it was if that fails."""
    if not target.exists():
        folder.replace(target)
    elif exchange(folder, target):
        _remove(folder)
    else:
        old = folder.with_name(folder.name + "-old")
        target.replace(old)
        try:
            folder.replace(target)
        except BaseException:  # an interrupt too
            old.replace(target)
            raise
        _remove(old)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
