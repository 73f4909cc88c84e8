"""Compile a kernel ahead of time, for a GPU that need not be there, and look at what came out.

Triton carries the assemblers and disassemblers of its targets, so that register counts, spills and the instructions
chosen can be checked on any machine. Triton's own ``python/triton/tools/compile.py`` compiles in the same way.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelParam

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTER_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one target: its text at every stage and the resources of one thread.

    On NVIDIA's targets ``sass``, ``registers`` and ``spill_bytes`` need ``cuobjdump`` and ``nvdisasm``; they raise
    RuntimeError where Triton came without.
    """

    target: str
    asm: Mapping[str, str | bytes] = field(repr=False)
    shared: int = 0
    """Bytes of shared memory of a program."""

    @property
    def assembly(self) -> str:
        """PTX, or the AMDGCN assembly."""
        return str(self.asm["ptx" if "ptx" in self.asm else "amdgcn"])

    @property
    def sass(self) -> str:
        """The machine instructions of an NVIDIA GPU, disassembled."""
        return str(self.asm["sass"])

    @cached_property
    def _instructions(self) -> tuple[list[str], dict[str, int]]:
        """Those of the SASS or of the AMDGCN assembly, and where each label of it points."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        nvidia = "cubin" in self.asm
        for line in (self.sass if nvidia else self.assembly).splitlines():
            text = line.split("\t")[-1].strip() if nvidia else line.partition(";")[0].rstrip()
            if text.endswith(":"):
                labels[text[:-1]] = len(instructions)
            elif text.endswith(";") if nvidia else re.match(r"\t[a-z]", text):
                instructions.append(text.strip())
        return instructions, labels

    @property
    def guarded_accesses(self) -> int:
        """Loads from and stores to global memory that a predicate guards.

        Those of a pipeline (``LDGSTS``) do not count: each has the end of the loop for a predicate, and so has every thread.
        """
        return sum(bool(re.match(r"@!?U?P\w+\s+(LDG|STG)\b", text)) for text in self._instructions[0])

    @cached_property
    def main_loop(self) -> list[str]:
        """The opcodes, ``LOP3`` or ``v_and_or_b32`` for one, of the longest loop, or of those with tensor cores' products."""
        instructions, labels = self._instructions
        loops = []
        for i, text in enumerate(instructions):
            branch = re.search(r"\bBRA\b.*?(\w+);$", text) or re.match(r"s_c?branch\w*\s+(\S+)$", text)
            if branch is None:
                continue
            # Where there is no label, it is an address, and an instruction takes 16 bytes.
            start = int(branch[1], 16) // 16 if branch[1].startswith("0x") else labels[branch[1]]
            if start < i:
                loops.append([_opcode(each) for each in instructions[start : i + 1]])
        products = [loop for loop in loops if any("MMA" in opcode or "mfma" in opcode for opcode in loop)]
        return max(products or loops, key=len, default=[])

    @cached_property
    def _resource_usage(self) -> str:
        """NVIDIA's report ``REG:n STACK:n SHARED:n LOCAL:n ...`` on the binary."""
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(cast("bytes", self.asm["cubin"]))
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _resource(self, nvidia: str, amd: str) -> int:
        pattern, text = (rf"{nvidia}:(\d+)", self._resource_usage) if "cubin" in self.asm else (amd, self.assembly)
        (number,) = re.findall(pattern, text)[:1]
        return int(number)

    @property
    def registers(self) -> int:
        """Vector registers a thread holds."""
        return self._resource("REG", r"\.vgpr_count:\s*(\d+)")

    @property
    def spill_bytes(self) -> int:
        """Bytes of a thread's stack. Triton code has no arrays or calls that would need one, so all of it is spills."""
        return self._resource("STACK", r"\.private_segment_fixed_size:\s*(\d+)")


def _opcode(instruction: str) -> str:
    """``LOP3`` of ``@!P0 LOP3.LUT R1, R2, ...;``, ``v_add_u32`` of ``v_add_u32_e32 v1, v2, v3``."""
    opcode = re.sub(r"^@!?\w+\s+", "", instruction).split()[0].rstrip(";").partition(".")[0]
    return re.sub(r"_(e32|e64|sdwa|dpp)$", "", opcode)


def compile_ahead(kernel: triton.JITFunction, arguments: Mapping[str, object], target: str) -> CompiledKernel:
    """Compile ``kernel`` as a launch with ``arguments`` would; Triton caches the result on disk likewise.

    Args:
        kernel: a ``@triton.jit`` function.
        arguments: its arguments by name, tuples among them, and compiler options such as ``num_warps``. Tensors are not read, so
            meta tensors do; they are taken to be aligned to 16 bytes, as torch allocates them.
        target: a key of :data:`TARGETS`.

    Raises:
        TypeError: Triton runs interpreted (``TRITON_INTERPRET=1``), or an argument is of a type a launch does not take.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError("an interpreted kernel cannot be compiled: unset TRITON_INTERPRET")
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for param in kernel.params:
        value = arguments[param.name]
        kinds = []
        for place, each in _places(param, value):
            kinds.append(_argument_type(param, each))
            if kinds[-1] == "constexpr":
                constants[place] = each
            elif _is_aligned(param, each):
                attributes[place] = [["tt.divisibility", 16]]
        signature[param.name] = tuple(kinds) if isinstance(value, tuple) else kinds[0]
    options = {name: value for name, value in arguments.items() if name not in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return CompiledKernel(target, compiled.asm, compiled.metadata.shared)


# The two below follow what Triton's launcher specializes a kernel on (triton.runtime.jit).


def _places(param: KernelParam, value: object) -> list[tuple[tuple[int, ...], object]]:
    """The argument, or each one of a tuple, and where it is."""
    if isinstance(value, tuple):
        return [((param.num, i), each) for i, each in enumerate(value)]
    return [((param.num,), value)]


def _argument_type(param: KernelParam, value: object) -> str:
    """Triton's name of the argument's type, ``"constexpr"`` for what a launch compiles in."""
    if param.is_constexpr or value is None or (type(value) is int and value == 1 and not param.do_not_specialize):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTER_TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"a kernel takes tensors, integers and None at run time, not {param.name}={value!r}")


def _is_aligned(param: KernelParam, value: object) -> bool:
    """Whether the compiler may assume that 16 divides the argument."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize)
