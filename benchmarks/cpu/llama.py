"""llama.cpp on the whole model: its files at each type, and greedy generation by llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Our bits to the type that is compared with them.
TYPES = {8: "Q8_0", 6: "Q6_K", 5: "Q5_0", 4: "Q4_0", 3: "Q3_K_M", 2: "Q2_K"}


def reason_missing() -> str | None:
    """Why there is no llama.cpp, or None."""
    return None if importlib.util.find_spec("llama_cpp") else "llama-cpp-python is not installed"


def convert(source: Path, folder: Path, kind: str) -> Path:
    """The model of the GGUF file ``source`` with weights of the type ``kind``, made by llama.cpp itself if it is not there yet."""
    import llama_cpp

    target = path_of(folder, kind)
    if not target.exists():
        _quiet(llama_cpp)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        parameters.allow_requantize = True  # the model comes as Q4_1; speed does not depend on what its weights were before
        scratch = target.with_suffix(".part")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(scratch).encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp could not convert {source.name} to {kind}")
        scratch.replace(target)
    return target


def path_of(folder: Path, kind: str) -> Path:
    """Where the file of a type is kept."""
    return folder / f"llama-{kind}.gguf"


class Greedy:
    """Greedy generation with a context of ``length`` tokens."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import llama_cpp

        _quiet(llama_cpp)
        self.logits: Callable[..., Any] = llama_cpp.llama_get_logits_ith
        # One batch takes the longest prompt whole.
        self.model: Any = llama_cpp.Llama(
            str(path), n_ctx=length, n_batch=length, n_ubatch=length, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def __call__(self, tokens: list[int], new: int) -> list[int]:
        """``new`` tokens after ``tokens``, whatever they are."""
        self.model.reset()
        self.model.eval(tokens)
        generated = [self._best()]
        while len(generated) < new:
            self.model.eval(generated[-1:])
            generated.append(self._best())
        return generated

    def _best(self) -> int:
        logits = np.ctypeslib.as_array(self.logits(self.model.ctx, -1), (self.model.n_vocab(),))
        return int(logits.argmax())

    @property
    def cache_bytes(self) -> int:
        """Keys and values in float16, as llama.cpp keeps them by default."""
        data = {name.partition(".")[2]: value for name, value in self.model.metadata.items()}
        width = int(data["embedding_length"]) // int(data["attention.head_count"]) * int(data["attention.head_count_kv"])
        return 2 * 2 * width * int(data["block_count"]) * int(self.model.n_ctx())


def _quiet(llama_cpp: Any) -> None:
    """No log of llama.cpp's on standard error. The callback must live as long as the library may call it."""
    llama_cpp.llama_log_set(_IGNORE, None)


_IGNORE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
