"""The Triton kernels against the reference, interpreted on the CPU, and what they compile to for GPUs not present.

``TRITON_INTERPRET=1`` acts when a kernel is defined and on everything else in the process that uses Triton. The
interpreted checks therefore run in a process of their own: ``python tests/test_triton_kernels.py linear``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import group_count, pack_codes, packed_width

pytest.importorskip("triton", reason="Triton is not installed")

from kbit_inductor.kernels.triton import aot
from kbit_inductor.kernels.triton import embedding as triton_embedding
from kbit_inductor.kernels.triton import linear as triton_linear
from kbit_inductor.kernels.triton.linear import Config, default_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled")

# Half the distance from 1 to the next number; the whole for bfloat16, to which Triton's interpreter truncates.
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-24}
DTYPES = st.sampled_from(list(UNIT))


# ---- strategies


def fenced(values: Tensor) -> Tensor:
    """A contiguous copy with NaN (255 for bytes) before and after, so that a read out of bounds shows."""
    fence = float("nan") if values.is_floating_point() else 255
    buffer = torch.full((values.numel() + 128,), fence, dtype=values.dtype)
    return buffer[64 : 64 + values.numel()].view(values.shape).copy_(values)


def packed_weight(rows: int, columns: int, bits: int, group_size: int, symmetric: bool, exponent: int) -> tuple:
    """``(planes, scale, offset, global_scale)`` of values of magnitude about ``2 ** exponent``."""
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    groups = group_count(columns, group_size)
    scale = fenced((torch.randn(rows, groups) / 2**bits).half())
    offset = None if symmetric else fenced(torch.randn(rows, groups).half())
    return fenced(pack_codes(codes, bits)), scale, offset, torch.tensor([2.0**exponent])


def with_strides(values: Tensor, layout: str) -> Tensor:
    """``values`` ``[M, K]`` under other strides or, when batched, as ``[1, M, K]``."""
    if layout == "transposed":
        return fenced(values.t().contiguous()).t()
    if layout == "stepped":
        apart = torch.full((2 * values.size(0), 3 * values.size(1)), float("nan"), dtype=values.dtype)
        return apart[::2, ::3].copy_(values)
    if layout == "expanded":
        return fenced(values[:1]).expand(values.shape)
    return fenced(values)[None] if layout == "batched" else fenced(values)


PACKED = {
    "bits": st.integers(1, 8),
    "columns": st.one_of(st.integers(0, 9), st.integers(10, 150)),
    "group_size": st.one_of(st.sampled_from([1, 8, 16, 32, 64, 128]), st.integers(1, 300)),
    "symmetric": st.booleans(),
    "exponent": st.integers(-8, 8),
    "seed": st.integers(0, 2**31),
}


# ---- interpreted: run by test_kernels_match_the_reference_when_interpreted


def dot_of_bfloat16() -> None:
    """Let the interpreter multiply bfloat16, whose bit patterns it takes for integers (triton-lang/triton#11584)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        widen = lambda handle: self.cast_impl(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle  # noqa: E731
        return original(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def linear_bound(x: Tensor, weight: Tensor, bias: Tensor | None, exact: Tensor, packed_unit: Tensor, config: Config):
    """The bound in the docstring of ``linear``, second order and underflow included; all but ``x`` is float64."""
    unit, single = UNIT[x.dtype], UNIT[torch.float32]
    weight_unit = single if config.block_m == 1 else unit
    operations = x.size(-1) + 2
    relative = (1 + weight_unit) * (1 + operations * single / (1 - operations * single)) - 1
    magnitude = x.double().abs()
    error = relative * (magnitude @ weight.abs().t())
    if x.dtype == torch.float16:
        error += 2**-25 * (magnitude.sum(-1, keepdim=True) * packed_unit + 1)  # subnormal weights and results
    if bias is not None:
        error += single * bias.abs()
    return unit * exact.abs() + (1 + unit) * error


@settings(max_examples=80, deadline=None, print_blob=True)
@given(
    **PACKED,
    m=st.one_of(st.integers(0, 5), st.integers(6, 40)),
    n=st.one_of(st.integers(0, 3), st.integers(4, 40)),
    dtype=DTYPES,
    bias=st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    layout=st.sampled_from(["contiguous", "transposed", "stepped", "expanded", "batched"]),
    config=st.sampled_from([None, None, Config(1, 16, 32), Config(16, 16, 16), Config(16, 32, 64), Config(64, 16, 32)]),
)
def check_linear(bits, columns, group_size, symmetric, exponent, seed, m, n, dtype, bias, layout, config):
    torch.manual_seed(seed)
    packed = packed_weight(n, columns, bits, group_size, symmetric, exponent)
    x = with_strides(torch.randn(m, columns).to(dtype), layout)
    bias = None if bias is None else fenced(torch.randn(n).to(bias))

    actual = triton_linear.linear(x, *packed, bias, group_size, config)

    exact = reference.linear(x.double(), *packed, bias, group_size)
    weight = reference.dequantize(*packed, columns, group_size, torch.float64)
    bias = None if bias is None else bias.double()
    config = config or default_config(m, dtype)
    bound = linear_bound(x, weight, bias, exact, packed[-1].double(), config)
    assert actual.dtype == dtype and actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), f"worst error is {(error / bound).nan_to_num(torch.inf).max():.3g} times the bound"


@settings(max_examples=100, deadline=None, print_blob=True)
@given(
    **PACKED,
    rows=st.integers(1, 40),
    shape=st.lists(st.integers(0, 6), max_size=3),
    dtype=DTYPES,
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def check_embedding(bits, columns, group_size, symmetric, exponent, seed, rows, shape, dtype, index_dtype):
    torch.manual_seed(seed)
    packed = packed_weight(rows, columns, bits, group_size, symmetric, exponent)
    indices = torch.randint(0, rows, shape, dtype=index_dtype)

    actual = triton_embedding.embedding(indices, *packed, columns, group_size, dtype)

    if dtype == torch.bfloat16:
        exact = reference.embedding(indices, *packed, columns, group_size, torch.float32)
        assert actual.shape == exact.shape and actual.dtype == dtype
        assert ((actual.float() - exact).abs() <= UNIT[dtype] * exact.abs()).all()
    else:
        assert torch.equal(actual, reference.embedding(indices, *packed, columns, group_size, dtype))


@settings(max_examples=5, deadline=None)
@given(outside=st.sampled_from([-1, -(2**31), 7, 2**31 - 1]))
def check_embedding_outside_the_table(outside):
    packed = packed_weight(7, 20, 3, 16, False, 0)
    actual = triton_embedding.embedding(torch.tensor([6, outside, 0]), *packed, 20, 16, torch.float32)
    assert actual[1].isnan().all() and not actual[[0, 2]].isnan().any()


def check_offsets_beyond_2_gib():
    """The last row of a table whose planes take over 2 GiB each; of its pages only that row's are ever touched."""
    rows, columns, bits = 2**19 + 8, 2**15, 2
    planes = torch.empty(bits, rows, packed_width(columns), dtype=torch.uint8)
    planes[:, -1].random_()
    scale = torch.empty(rows, 1, dtype=torch.float16)
    scale[-1] = 0.5
    operands = (torch.tensor([rows - 1]), planes, scale, None, torch.ones(1), columns, columns, torch.float32)
    assert torch.equal(triton_embedding.embedding(*operands), reference.embedding(*operands))


def check_config_of_bfloat16():
    """By default the interpreter's fault with bfloat16 is avoided, not patched as in the other checks."""
    packed = packed_weight(9, 40, 4, 16, False, 0)
    x = torch.randn(20, 40).bfloat16()
    torch.testing.assert_close(
        triton_linear.linear(x, *packed, None, 16).float(),
        reference.linear(x.float(), *packed, None, 16),
        rtol=2 * UNIT[torch.bfloat16],
        atol=1e-5,
    )


# ---- tests


@pytest.mark.parametrize("kernel", ["linear", "embedding"])
def test_kernels_match_the_reference_when_interpreted(kernel):
    run = subprocess.run(
        [sys.executable, __file__, kernel],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_package_imports_without_triton():
    script = """
import sys
sys.modules["triton"] = None
import kbit_inductor.kernels.triton
try:
    import kbit_inductor.kernels.triton.linear
except ImportError:
    sys.exit(0)
sys.exit("the kernels were imported without Triton")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_other_dtypes_are_refused():
    packed = packed_weight(2, 8, 4, 8, True, 0)
    with pytest.raises(TypeError, match="float64"):
        triton_linear.linear(torch.zeros(1, 8, dtype=torch.float64), *packed, None, 8)
    with pytest.raises(TypeError, match="float64"):
        triton_embedding.embedding(torch.zeros(1, dtype=torch.int64), *packed, 8, 8, torch.float64)


def packed_on_meta(rows: int, columns: int, bits: int, group_size: int, symmetric: bool) -> tuple:
    """The shapes and dtypes of a packed weight, without data."""
    with torch.device("meta"):
        planes = torch.empty(bits, rows, packed_width(columns), dtype=torch.uint8)
        scale = torch.empty(rows, group_count(columns, group_size), dtype=torch.float16)
        return planes, scale, None if symmetric else scale, torch.empty(1)


def compile_linear(
    target: str, dtype: torch.dtype, m: int, bits: int, n=4096, k=4096, group_size=64, symmetric=True
) -> aot.CompiledKernel:
    """The kernel that ``linear`` would launch; with a bias unless the grid is symmetric, to see both of each."""
    packed = packed_on_meta(n, k, bits, group_size, symmetric)
    x, out, bias = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((m, k), (m, n), (n,)))
    arguments = triton_linear.launch_arguments(x, *packed, None if symmetric else bias, group_size, out, default_config(m, dtype))
    return aot.compile_ahead(triton_linear.linear_kernel, arguments, target)


# Groups of 7 columns and odd sizes need the most registers: nothing is aligned, every column loads its own scale.
HARDEST = {"n": 4097, "k": 4095, "group_size": 7, "symmetric": False}


@compiled
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_linear_compiles_without_spills(target, bits):
    tiles = [(torch.float16, 128), (torch.bfloat16, 16), (torch.float32, 1)]
    if bits == 8:
        tiles.append((torch.float32, 16))
    for dtype, m in tiles:
        kernel = compile_linear(target, dtype, m, bits, **HARDEST)
        assert 0 < kernel.registers <= 255
        assert kernel.spill_bytes == 0, f"{kernel.spill_bytes} bytes spilled at {dtype}, {m} rows"


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("target", "m", "ptx", "sass"),
    [("sm_80", 16, "mma.sync", "HMMA"), ("sm_80", 128, "mma.sync", "HMMA"),
     ("sm_90", 16, "mma.sync", "HMMA"), ("sm_90", 128, "wgmma.mma_async", "HGMMA")],
)  # fmt: skip
def test_linear_uses_tensor_cores(target, m, ptx, sass, dtype):
    kernel = compile_linear(target, dtype, m, bits=4)
    assert ptx in kernel.assembly and sass in kernel.sass


@compiled
@pytest.mark.parametrize("dtype", UNIT)
def test_linear_compiles_for_amd(dtype):
    kernel = compile_linear("gfx942", dtype, 128, bits=3)
    assert "v_mfma" in kernel.assembly
    assert kernel.registers > 0 and kernel.spill_bytes == 0


@compiled
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_embedding_compiles_without_spills(target):
    packed = packed_on_meta(32000, 4096, 5, 64, symmetric=False)
    indices, out = (torch.empty(20, device="meta", dtype=torch.int64), torch.empty(20, 4096, device="meta"))
    arguments = triton_embedding.launch_arguments(indices, *packed, 64, out)
    assert aot.compile_ahead(triton_embedding.embedding_kernel, arguments, target).spill_bytes == 0


if __name__ == "__main__":
    if sys.argv[1] == "linear":
        check_config_of_bfloat16()
        dot_of_bfloat16()
        check_linear()
    else:
        check_embedding()
        check_embedding_outside_the_table()
        check_offsets_beyond_2_gib()
