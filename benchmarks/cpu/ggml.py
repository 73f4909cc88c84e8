"""One product of llama.cpp's ``ggml``, called by ctypes in the libraries that come with llama-cpp-python.

The weight lies in the buffer where llama.cpp itself would put it: repacked where its CPU backend has such a kernel for the type.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import weakref
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cpu.contender import Copy
from cpu.timing import Call

# enum ggml_type: name to number, and the bits of its codes.
TYPES = {
    "q8_0": (8, 8), "q6_K": (14, 6), "q5_0": (6, 5), "q5_K": (13, 5),
    "q4_0": (2, 4), "q4_K": (12, 4), "q3_K": (11, 3), "q2_K": (10, 2),
}  # fmt: skip
F32 = 0
NODES = 8  # room in a graph of one product


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, ...]] = {  # function: type of the result, then of the arguments
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_type_name": (c_char_p, c_int),
    "ggml_blck_size": (c_int64, c_int),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
}


class Library:
    """The functions of :data:`_SIGNATURES` by their names without ``ggml_``, and a CPU backend."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("llama-cpp-python is not installed")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        self._libraries = [ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu")]
        self._quiet = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
        self.log_set(self._quiet, None)
        self.backend = self.backend_cpu_init()
        self.device = self.backend_reg_dev_get(self.backend_cpu_reg(), 0)
        self.buffer_types = [*self._repacking(), self.backend_cpu_buffer_type()]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The function ``ggml_{name}``, found at its first use."""
        result, *arguments = _SIGNATURES[f"ggml_{name}"]
        function = next(getattr(library, f"ggml_{name}") for library in self._libraries if hasattr(library, f"ggml_{name}"))
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)
        return cast("Callable[..., Any]", function)

    def _repacking(self) -> list[int]:
        """The buffer types in which the CPU backend keeps weights in another order: an array that ends with a null."""
        address = self.backend_reg_get_proc_address(self.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
        return list(itertools.takewhile(bool, (found[index] for index in itertools.count()))) if found else []

    def context(self) -> int:
        """Room for a few tensors' descriptions and a graph, without their data."""
        size = 4 * self.tensor_overhead() + self.graph_overhead_custom(NODES, False)
        return int(self.init(_InitParams(size, None, True)))


@functools.cache
def library() -> Library:
    """The libraries, loaded once."""
    return Library()


def load(kind: str, weight: Tensor) -> functools.partial[Copy]:
    """A maker of copies of ``weight [N, K]``, float32, in blocks of the type ``kind``."""
    ggml = library()
    number, _ = TYPES[kind]
    rows, columns = weight.shape
    if ggml.type_name(number) != kind.encode():
        raise NotImplementedError(f"this release of ggml has no {kind}")
    if columns % (block := ggml.blck_size(number)):
        raise NotImplementedError(f"{columns} columns are no multiple of {kind}'s {block}")
    blocks = np.empty(ggml.row_size(number, columns) * rows, np.uint8)
    ggml.quantize_chunk(number, weight.contiguous().data_ptr(), blocks.ctypes.data, 0, rows, columns, None)
    return functools.partial(Weight.copy, number, rows, columns, blocks)


class Weight:
    """A weight ``[N, K]`` in a buffer of ggml."""

    def __init__(self, number: int, rows: int, columns: int, blocks: np.ndarray) -> None:
        ggml = library()
        self.rows = rows
        for buffer_type in ggml.buffer_types:
            context = ggml.context()
            self.tensor = ggml.new_tensor_2d(context, number, columns, rows)
            buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            weakref.finalize(self, _free, context, buffer)
            if buffer and self._has_kernel(columns):
                break
        ggml.backend_tensor_set(self.tensor, blocks.ctypes.data, 0, blocks.nbytes)

    @classmethod
    def copy(cls, number: int, rows: int, columns: int, blocks: np.ndarray) -> Copy:
        """A new weight as a contender's copy."""
        return Copy(blocks.nbytes, cls(number, rows, columns, blocks).bind)

    def _has_kernel(self, columns: int) -> bool:
        """Whether the backend multiplies a weight in this buffer."""
        ggml = library()
        context = ggml.context()
        product = ggml.mul_mat(context, self.tensor, ggml.new_tensor_2d(context, F32, columns, 1))
        supported = bool(ggml.backend_dev_supports_op(ggml.device, product))
        ggml.free(context)
        return supported

    def bind(self, x: Tensor) -> Call:
        """A graph of one product with ``x [M, K]``."""
        return Product(self, x)


class Product:
    """``y = x Wᵀ`` as a graph; a call computes it and returns ``y [M, N]``, the same array each time."""

    def __init__(self, weight: Weight, x: Tensor) -> None:
        ggml = library()
        context = ggml.context()
        inputs = ggml.new_tensor_2d(context, F32, x.size(1), x.size(0))
        product = ggml.mul_mat(context, weight.tensor, inputs)
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, ggml.backend_cpu_buffer_type())
        weakref.finalize(self, _free, context, buffer)
        ggml.backend_tensor_set(inputs, x.contiguous().data_ptr(), 0, x.nbytes)
        self.weight = weight
        self.graph = ggml.new_graph_custom(context, NODES, False)
        ggml.build_forward_expand(self.graph, product)
        ggml.backend_cpu_set_n_threads(ggml.backend, torch.get_num_threads())
        self.compute, self.backend = ggml.backend_graph_compute, ggml.backend
        self.y = np.ctypeslib.as_array(ctypes.cast(ggml.get_data(product), ctypes.POINTER(c_float)), (x.size(0), weight.rows))

    def __call__(self) -> np.ndarray:
        if self.compute(self.backend, self.graph):
            raise RuntimeError("ggml could not compute the graph")
        return self.y


def _free(context: int, buffer: int) -> None:
    ggml = library()
    if buffer:
        ggml.backend_buffer_free(buffer)
    ggml.free(context)
