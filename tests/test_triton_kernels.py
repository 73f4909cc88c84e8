"""The Triton kernels against the reference, interpreted on the CPU, and what they compile to for GPUs not present.

``TRITON_INTERPRET=1`` acts when a kernel is defined and on everything else in the process that uses Triton. The
interpreted checks therefore run in a process of their own: ``python tests/test_triton_kernels.py linear``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kbit_inductor.kernels import reference
from kbit_inductor.kernels.layout import FP8, group_count, midpoint, pack_codes
from kbit_inductor.kernels.words import WordLayout, pack_words
from kbit_inductor.lowering import gpu
from kbit_inductor.lowering.gpu import dequantize_words

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from gpu.instructions import compile_product

from kbit_inductor.kernels.triton import aot, launch, unpack
from kbit_inductor.kernels.triton import bits as triton_bits
from kbit_inductor.kernels.triton import dequantize as triton_dequantize
from kbit_inductor.kernels.triton import embedding as triton_embedding
from kbit_inductor.kernels.triton import grouped as triton_grouped
from kbit_inductor.kernels.triton import linear as triton_linear
from kbit_inductor.kernels.triton import quantize as triton_quantize
from kbit_inductor.kernels.triton.config import FLOAT_ROWS, Config
from kbit_inductor.kernels.triton.epilogue import ACTIVATIONS, Epilogue
from kbit_inductor.kernels.triton.launch import Matrix
from kbit_inductor.kernels.triton.norm import Norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled")

# Half the distance from 1 to the next number; the whole for bfloat16, to which Triton's interpreter truncates.
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float32: 2**-24}
EXAMPLES = int(os.environ.get("KBIT_TEST_EXAMPLES", "45"))
SUMS = 2**-24 if INTERPRETED else 2**-23  # of float32 sums: tensor cores truncate where they add
DTYPES = st.sampled_from(list(UNIT))
ACTIVATION_BITS = st.sampled_from([16, 16, 1, 4, 8, FP8])


# ---- strategies


def fenced(values: Tensor) -> Tensor:
    """A contiguous copy with NaN (255 for bytes) before and after, so that a read out of bounds shows."""
    fence = float("nan") if values.is_floating_point() else torch.iinfo(values.dtype).max
    buffer = torch.full((values.numel() + 128,), fence, dtype=values.dtype)
    return buffer[64 : 64 + values.numel()].view(values.shape).copy_(values)


def packed_weight(rows: int, columns: int, bits: int, group_size: int, symmetric: bool, exponent: int, codebook=False) -> tuple:
    """``(scale, offset, global_scale), codes, codebook`` of values of magnitude about ``2 ** exponent``."""
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    groups = group_count(columns, group_size)
    scale = (torch.randn(rows, groups) / 2**bits).half()
    offset = None if symmetric else torch.randn(rows, groups).half()
    levels = torch.randint(0, 256, (2**bits,)).sort()[0].to(torch.uint8) if codebook and 1 < bits < 8 else None
    return (scale, offset, torch.tensor([2.0**exponent])), codes, levels


def as_words(grid: tuple, codes: Tensor, bits: int, group_size: int) -> tuple:
    """The operands of the kernels of a weight that :func:`packed_weight` gives."""
    scale, offset, global_scale = grid
    groups_first = (fenced(scale.t()), None if offset is None else fenced(offset.t()))
    return fenced(pack_words(codes, bits, group_size)), *groups_first, global_scale


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
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        widen = lambda handle: self.cast_impl(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle  # noqa: E731
        return original(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def linear_bound(
    x: Tensor, grid: tuple, codes: Tensor, level_bits: int, group_size: int, exact: Tensor, bias: Tensor | None, rounded=False
) -> Tensor:  # fmt: skip
    """The bound in the docstring of ``linear`` before the activation; all but ``x`` is float64."""
    unit, single = UNIT[x.dtype], SUMS
    scale, offset, global_scale = (None if each is None else each.double() for each in grid)
    lift = 0 if x.dtype == torch.float16 else 272 if level_bits == 8 else 128
    if rounded:
        lift = 256 if level_bits == 8 else 0
    group = torch.arange(x.size(-1)) // group_size
    middle = scale * midpoint(level_bits) if offset is None else offset
    magnitude = (scale.abs()[:, group] * (codes + lift) + middle.abs()[:, group]) * global_scale
    operations = x.size(-1) + 8
    error = operations * single / (1 - operations * single) * (x.double().abs() @ magnitude.t())
    if x.dtype == torch.float16:
        error += 2**-25  # a subnormal result
    if x.dtype == torch.float32:
        error += 2.0**-100  # the last of the three bfloat16 may be one
    if bias is not None:
        error += single * bias.abs()
    return unit * exact.abs() + (1 + unit) * error


def assert_is_product(actual, x, grid, codes, levels, bits, group_size, bias=None, activation_bits=16):
    """``actual`` is ``x @ W.T + bias`` of the packed weight, within the bound, or infinite where that is beyond the dtype."""
    wide = x.double()
    if activation_bits < 16:
        wide = reference.round_activations(launch.flat_rows(x), group_size, activation_bits).view(x.shape)
    exact = reference.linear(wide, pack_codes(codes, bits), *grid, bias, group_size, levels)
    found, level_bits = (codes, bits) if levels is None else (levels[codes.int()], 8)
    bias = None if bias is None else bias.double()
    # The step of 1 bit, a mean, is a sum of up to K terms itself, in the kernel and in its definition.
    magnitude = (3 * wide if activation_bits == 1 else wide).to(x.dtype)
    bound = linear_bound(magnitude, grid, found.double(), level_bits, group_size, exact, bias, activation_bits < 16)
    assert actual.dtype == x.dtype and actual.shape == exact.shape
    beyond = (exact.abs() + bound > torch.finfo(actual.dtype).max) & (actual.double() == exact.sign() * torch.inf)
    error = (actual.double() - exact).abs().masked_fill(beyond, 0)
    assert (error <= bound).all(), f"worst error is {(error / bound).nan_to_num(torch.inf).max():.3g} times the bound"


CONFIGS = st.sampled_from(["default", "decode", "split", "flat", "wide"])


def config_named(name: str, layout: WordLayout) -> Config | None:
    return {
        "default": None,
        "decode": Config(8, 16, layout.block_pieces),
        "split": Config(16, 32, layout.block_pieces, split_k=3),
        "flat": Config(32, 32, 2, sums=True),
        "wide": Config(16, 64, 2, sums=True, split_k=2),
    }[name]


@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
@given(
    **PACKED,
    m=st.one_of(st.integers(0, 5), st.integers(6, 40)),
    n=st.one_of(st.integers(0, 3), st.integers(4, 40)),
    dtype=DTYPES,
    codebook=st.booleans(),
    bias=st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    strides=st.sampled_from(["contiguous", "transposed", "stepped", "expanded", "batched"]),
    config=CONFIGS,
    activation_bits=ACTIVATION_BITS,
)
@example(
    bits=6, columns=150, group_size=32, symmetric=False, exponent=0, seed=0, m=3, n=20, dtype=torch.float16, codebook=False,
    bias=None, strides="contiguous", config="split", activation_bits=16,
)  # fmt: skip
@example(
    bits=1, columns=0, group_size=1, symmetric=False, exponent=0, seed=0, m=1, n=1, dtype=torch.float16, codebook=False,
    bias=None, strides="contiguous", config="split", activation_bits=FP8,
)  # fmt: skip
@example(  # beyond float16
    bits=2, columns=65, group_size=1, symmetric=False, exponent=6, seed=1, m=1, n=4, dtype=torch.float16, codebook=True,
    bias=None, strides="contiguous", config="default", activation_bits=16,
)  # fmt: skip
def check_linear(
    bits, columns, group_size, symmetric, exponent, seed, m, n, dtype, codebook, bias, strides, config, activation_bits
):  # fmt: skip
    torch.manual_seed(seed)
    grid, codes, levels = packed_weight(n, columns, bits, group_size, symmetric, exponent, codebook)
    x = with_strides(torch.randn(m, columns).to(dtype), strides)
    bias = None if bias is None else fenced(torch.randn(n).to(bias))

    chosen = config_named(config, WordLayout.of(bits, columns, group_size))
    words = as_words(grid, codes, bits, group_size)
    actual = triton_linear.linear(x, *words, bias, bits, group_size, levels, activation_bits=activation_bits, config=chosen)
    assert_is_product(actual, x, grid, codes, levels, bits, group_size, bias, activation_bits)


@settings(max_examples=min(25, EXAMPLES), deadline=None, print_blob=True)
@given(
    dtype=DTYPES, activation=st.sampled_from(ACTIVATIONS), bias=st.booleans(), factor=st.booleans(), residual=st.booleans(),
    config=CONFIGS, m=st.integers(1, 9), n=st.integers(1, 40), size=st.sampled_from([0.01, 1, 30]), seed=st.integers(0, 2**31),
)  # fmt: skip
def check_epilogue(dtype, activation, bias, factor, residual, config, m, n, size, seed):
    """In float64 on what the plain product gives in float32: the epilogue alone is under test."""
    torch.manual_seed(seed)
    grid, codes, _ = packed_weight(n, 64, 4, 32, False, 0)
    words = as_words(grid, codes, 4, 32)
    x = (torch.randn(m, 64) * size).to(dtype)
    chosen = config_named(config, WordLayout.of(4, 64, 32))
    bias_, factor_, residual_ = (
        torch.randn(shape).to(dtype) if wanted else None for shape, wanted in ((n, bias), ((m, n), factor), ((m, n), residual))
    )
    behind = Epilogue(activation, factor=factor_, residual=residual_)
    actual = triton_linear.fused_linear(x, (Matrix(*words, None, bias_),), 4, 32, None, behind, config=chosen)

    exact = reference.linear(x.double(), pack_codes(codes, 4), *grid, bias_, 32)
    functions = {"": lambda y: y, "relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh}
    functions |= {"gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"), "sigmoid": torch.sigmoid}
    wanted = functions[activation](exact)
    level = 1.2 * linear_bound(x, grid, codes.double(), 4, 32, exact * 0, bias_) + 2**-21 * exact.abs()  # no slope exceeds 1.13
    if factor:
        wanted, level = wanted * factor_.double(), level * factor_.double().abs()
    if residual:
        wanted = wanted + residual_.double()
        level = level + 2**-23 * residual_.double().abs()
    assert ((actual.double() - wanted).abs() <= UNIT[dtype] * wanted.abs() + (1 + UNIT[dtype]) * level + 2**-25).all()


def rounded_norm(x: Tensor, norm: Norm, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    """The norm of ``x`` ``[M, K]`` as it is rounded, and how far off a kernel's may be, float64.

    A float32 sum of K squares, a root, and a few products are off by ``(K + 16) u``, and so is the step. What is then on the other
    side of the middle of two steps becomes the next of them.
    """
    normed = functional.rms_norm(x.double(), x.shape[-1:], norm.weight.double(), norm.eps)
    if bits == FP8:
        step, to_nearest = normed.abs().amax(1, keepdim=True) / 448, lambda t: t.clamp(-448, 448).to(torch.float8_e4m3fn).double()
    else:
        largest = [part.abs().amax(1, keepdim=True).expand_as(part) for part in normed.split(group_size, 1)]
        step, to_nearest = torch.cat(largest, 1) / (2 ** (bits - 1) - 1), torch.round
    off = 2 * (x.size(1) + 16) * 2**-24
    steps = normed / step.clamp_min(2**-126)
    low, middle, high = (to_nearest(steps * factor) * step for factor in (1 - off, 1, 1 + off))
    return middle, (high - low).abs() + off * middle.abs()


MULTIPLIED_AS_THEY_ARE = {  # 8-bit floats, of many rows by short codes on GPUs that take them
    "rows": [20, 7], "gated": False, "symmetric": False, "bias": True, "activation_bits": FP8, "held": False, "config": "flat",
    "m": 20, "columns": 150, "seed": 0,
}  # fmt: skip


@settings(max_examples=min(25, EXAMPLES), deadline=None, print_blob=True)
@given(
    bits=st.integers(1, 8), rows=st.lists(st.integers(1, 40), min_size=1, max_size=3), gated=st.booleans(), norm=st.booleans(),
    symmetric=st.booleans(), bias=st.booleans(), activation_bits=st.sampled_from([16, 16, 8, FP8]), held=st.booleans(),
    config=CONFIGS, dtype=DTYPES, m=st.integers(1, 20), columns=st.integers(1, 150), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(**MULTIPLIED_AS_THEY_ARE, bits=4, norm=False, dtype=torch.float16)
@example(**MULTIPLIED_AS_THEY_ARE, bits=3, norm=True, dtype=torch.bfloat16)
def check_several_matrices(
    bits, rows, gated, norm, symmetric, bias, activation_bits, held, config, dtype, m, columns, seed
):  # fmt: skip
    """In one launch what each gives in its own, bit by bit, and within the bound with a norm in front or a gate behind."""
    torch.manual_seed(seed)
    rows = rows[:1] * 2 if gated else rows
    grids = [packed_weight(n, columns, bits, 32, symmetric, i)[:2] for i, n in enumerate(rows)]
    biases = [torch.randn(n) if bias else None for n in rows]
    matrices = [Matrix(*as_words(*grid, bits, 32), None, each) for grid, each in zip(grids, biases, strict=True)]
    x, behind = torch.randn(m, columns).to(dtype), Epilogue("silu" if gated else "", gated)
    told = {"activation_bits": activation_bits, "config": config_named(config, WordLayout.of(bits, columns, 32))}
    before = Norm(torch.rand(columns).to(dtype) + 0.5, 1e-5) if norm and activation_bits != 16 else None
    takes_fp8 = launch.takes_fp8
    with pytest.MonkeyPatch.context() as patch:  # float16 holds 8-bit floats, or they are multiplied where that is possible
        patch.setattr(launch, "takes_fp8", lambda x: not held and (INTERPRETED or takes_fp8(x)))
        together = triton_linear.fused_linear(x, matrices, bits, 32, before, behind, **told)
        if before is None and not gated and told["config"] is not None:
            apart = [triton_linear.fused_linear(x, [each], bits, 32, **told) for each in matrices]
            assert torch.equal(together, torch.cat(apart, -1))
    wide, off = x.double(), torch.zeros(m, columns, dtype=torch.float64)
    if activation_bits != 16:
        wide = reference.round_activations(x, 32, activation_bits)
    if before is not None:
        wide, off = rounded_norm(x, before, 32, activation_bits)
    told = (bits, activation_bits < 16)
    exact, level = zip(*(several_bound(x, wide, off, *each, *told) for each in zip(grids, biases, strict=True)), strict=True)
    if gated:  # no slope of silu exceeds 1.1
        first, error = functional.silu(exact[0]), 1.1 * level[0] + 2**-21 * exact[0].abs()
        wanted, slack = first * exact[1], error * (exact[1].abs() + level[1]) + (first.abs() + error) * level[1]
    else:
        wanted, slack = torch.cat(exact, -1), torch.cat(level, -1)
    assert ((together.double() - wanted).abs() <= (UNIT[dtype] + 2**-23) * wanted.abs() + (1 + UNIT[dtype]) * slack + 2**-25).all()


def several_bound(x, wide, off, grid, bias, bits, rounded):
    """A product of the float64 ``wide``, off by ``off``, with a weight in groups of 32, and how far float32 sums may be off."""
    packed, codes = grid
    exact = reference.linear(wide, pack_codes(codes, bits), *packed, None if bias is None else bias.double(), 32)
    weight = reference.dequantize(pack_codes(codes, bits), *packed, codes.size(1), 32, torch.float64)
    bias = None if bias is None else bias.double()
    level = linear_bound((wide.abs() + off).to(x.dtype), packed, codes.double(), bits, 32, exact * 0, bias, rounded)
    return exact, level + off @ weight.abs().t()


def check_split_sums_do_not_depend_on_the_order_of_programs():
    """The last to arrive adds up in the order of the columns, whoever it is: the sum of a split is that of its parts."""
    grid, codes, _ = packed_weight(32, 1024, 4, 32, False, 0)
    words, x = as_words(grid, codes, 4, 32), torch.randn(2, 1024)
    split = triton_linear.linear(x, *words, None, 4, 32, config=Config(8, 32, 4, split_k=4))
    parts = []
    for first in range(0, 1024, 256):
        columns, groups = slice(first, first + 256), slice(first // 32, (first + 256) // 32)
        scale, offset, global_scale = grid
        part = as_words((scale[:, groups], offset[:, groups], global_scale), codes[:, columns], 4, 32)
        parts.append(triton_linear.linear(x[:, columns], *part, None, 4, 32, config=Config(8, 32, 4)))
    assert torch.equal(split, ((parts[0] + parts[1]) + parts[2]) + parts[3])


def packed_batch(count: int, n: int, columns: int, bits: int, group_size: int, symmetric: bool, exponent: int, codebook: bool):
    """Matrices of :func:`packed_weight`, and the operands of the kernels of all of them: words, their grids, codebooks."""
    matrices = [packed_weight(n, columns, bits, group_size, symmetric, exponent - 4 - i, codebook) for i in range(count)]
    operands = zip(*((*as_words(grid, codes, bits, group_size), levels) for grid, codes, levels in matrices), strict=True)
    *words, levels = (None if each[0] is None else fenced(torch.stack(each)) for each in operands)
    return matrices, words, levels


EXPERTS = PACKED | {
    "n": st.integers(1, 20),
    "dtype": DTYPES,
    "codebook": st.booleans(),
    "config": st.sampled_from(["default", "flat"]),
}
EXPERTS |= {"columns": st.integers(1, 70), "where_dtype": st.sampled_from([torch.int32, torch.int64])}
EXPERTS |= {"activation_bits": ACTIVATION_BITS}


@settings(max_examples=5, deadline=None, print_blob=True)
@given(**EXPERTS, counts=st.lists(st.integers(0, 12), min_size=1, max_size=3), rest=st.integers(0, 9))
def check_grouped(
    bits, columns, group_size, symmetric, exponent, seed, n, dtype, codebook, config, where_dtype, activation_bits, counts, rest
):  # fmt: skip
    torch.manual_seed(seed)
    matrices, words, levels = packed_batch(len(counts), n, columns, bits, group_size, symmetric, exponent, codebook)
    x, offsets = (
        fenced(torch.randn(sum(counts) + rest, columns).to(dtype)),
        fenced(torch.tensor(counts).cumsum(0, dtype=where_dtype)),
    )
    chosen = config_named(config, WordLayout.of(bits, columns, group_size))
    product = triton_grouped.grouped_linear(x, *words, offsets, bits, group_size, levels, activation_bits, chosen)
    *groups, zeros = product.split([*counts, rest])
    for actual, rows, matrix in zip(groups, x.split([*counts, rest]), matrices, strict=False):
        assert_is_product(actual, rows, *matrix, bits, group_size, None, activation_bits)
    assert torch.equal(zeros, torch.zeros(rest, n, dtype=dtype))


@settings(max_examples=5, deadline=None, print_blob=True)
@given(**EXPERTS, m=st.integers(1, 20), index=st.one_of(st.none(), st.lists(st.integers(-5, 4), max_size=6)))
def check_batched(
    bits, columns, group_size, symmetric, exponent, seed, n, dtype, codebook, config, where_dtype, activation_bits, m, index
):  # fmt: skip
    """With an index of fewer entries than matrices, of more, or none. Of 3 matrices, -5 to -4, 3 and 4 are none."""
    torch.manual_seed(seed)
    matrices, words, levels = packed_batch(3, n, columns, bits, group_size, symmetric, exponent, codebook)
    chosen = config_named(config, WordLayout.of(bits, columns, group_size))
    x = fenced(torch.randn(3 if index is None else len(index), m, columns).to(dtype))
    where = None if index is None else fenced(torch.tensor(index, dtype=where_dtype))
    actual = triton_grouped.batched_linear(x, *words, where, bits, group_size, levels, activation_bits, chosen)
    for result, rows, i in zip(actual, x, range(3) if index is None else index, strict=True):
        if -3 <= i < 3:
            assert_is_product(result, rows, *matrices[i], bits, group_size, None, activation_bits)
        else:
            assert result.isnan().all()


def check_a_graph_of_fused_products() -> None:
    """A gated layer as the passes leave it, every call of it by the kernel."""
    from test_gpu_fusion import TRITON, Gated, ran

    from kbit_inductor._compat import scoped_library
    from kbit_inductor.lowering.registry import Choice
    from kbit_inductor.passes import lower

    with scoped_library("kbit", "IMPL") as library, pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(lower, "choose", lambda *_: Choice(TRITON, ()))
        library.impl("linear_triton", gpu._linear, "CPU")
        library.impl("fused_linear_triton", gpu._fused_linear, "CPU")
        graph, error = ran(Gated(), torch.randn(3, 24), activation_bits=16)
    assert graph.fusions == {"activation": 1, "gate": 1, "residual": 1} and error < 1e-5


@settings(max_examples=EXAMPLES, deadline=None, print_blob=True)
@given(
    **PACKED,
    rows=st.integers(1, 40),
    shape=st.lists(st.integers(0, 6), max_size=3),
    dtype=DTYPES,
    codebook=st.booleans(),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def check_embedding(bits, columns, group_size, symmetric, exponent, seed, rows, shape, dtype, codebook, index_dtype):
    torch.manual_seed(seed)
    grid, codes, levels = packed_weight(rows, columns, bits, group_size, symmetric, exponent, codebook)
    indices = torch.randint(0, rows, shape, dtype=index_dtype)

    words = as_words(grid, codes, bits, group_size)
    actual = triton_embedding.embedding(indices, *words, columns, bits, group_size, dtype, levels)

    packed = (pack_codes(codes, bits), *grid, columns, group_size)
    if dtype == torch.bfloat16:
        exact = reference.embedding(indices, *packed, torch.float32, levels)
        assert actual.shape == exact.shape and actual.dtype == dtype
        assert ((actual.float() - exact).abs() <= UNIT[dtype] * exact.abs()).all()
    else:
        assert torch.equal(actual, reference.embedding(indices, *packed, dtype, levels))


@settings(max_examples=12, deadline=None, print_blob=True)
@given(
    bits=st.integers(1, 8), activation_bits=st.integers(1, 4), words=st.integers(0, 40), group_words=st.integers(1, 9),
    symmetric=st.booleans(), m=st.integers(0, 3), n=st.integers(0, 20), dtype=DTYPES, bias=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def check_bits(bits, activation_bits, words, group_words, symmetric, m, n, dtype, bias, seed):
    torch.manual_seed(seed)
    columns, group_size = 32 * words, 32 * group_words
    grid, codes, _ = packed_weight(n, columns, bits, group_size, symmetric, -2)
    x, bias = fenced(torch.randn(m, columns).to(dtype)), fenced(torch.randn(n)) if bias else None
    scale, offset, global_scale = grid
    operands = (fenced(pack_codes(codes, bits)), fenced(scale), None if symmetric else fenced(offset), global_scale)
    actual = triton_bits.linear_bits(x, *operands, bias, group_size, None, activation_bits)
    assert_is_product(actual, x, grid, codes, None, bits, group_size, bias, activation_bits)


@settings(max_examples=12, deadline=None, print_blob=True)
@given(**PACKED, rows=st.integers(0, 40), dtype=DTYPES, codebook=st.booleans())
def check_dequantize(bits, columns, group_size, symmetric, exponent, seed, rows, dtype, codebook):
    torch.manual_seed(seed)
    grid, codes, levels = packed_weight(rows, columns, bits, group_size, symmetric, exponent, codebook)
    actual = triton_dequantize.dequantize(*as_words(grid, codes, bits, group_size), bits, columns, group_size, levels, dtype)
    exact = reference.dequantize(pack_codes(codes, bits), *grid, columns, group_size, torch.float32, levels)
    assert actual.shape == exact.shape and actual.dtype == dtype
    if dtype == torch.bfloat16:  # which the interpreter truncates
        assert ((actual.float() - exact).abs() <= UNIT[dtype] * exact.abs()).all()
    else:
        assert torch.equal(actual, exact.to(dtype))


def check_many_rows_are_multiplied_by_a_float_weight():
    """By the operator of one matrix, with the weight in parts; one row fewer, and its words are read."""
    grid, codes, _ = packed_weight(5, 32, 4, 16, False, 0)
    words, bias = as_words(grid, codes, 4, 16), torch.randn(5)
    x = torch.randn(2, FLOAT_ROWS // 2, 32).half()
    seen = []
    original = triton_dequantize.dequantize
    triton_dequantize.dequantize = lambda *arguments: seen.append(len(arguments[0])) or original(*arguments)
    triton_dequantize.WEIGHTS_AT_ONCE = 64
    try:
        actual = gpu._linear(x, *words, bias, 4, 16)
        assert seen == [2, 2, 1]
        lists = ([each] for each in (*words, bias))
        fused = gpu._fused_linear(x, None, 0.0, *lists, [], 4, 16, "silu", False, actual, actual, 16)
        assert seen == [2, 2, 1] * 2
        gpu._linear(x.flatten(0, 1)[1:], *words, bias, 4, 16)
        assert seen == [2, 2, 1] * 2
    finally:
        triton_dequantize.dequantize, triton_dequantize.WEIGHTS_AT_ONCE = original, 1 << 26
    behind = (functional.silu(actual.float()) * actual + actual).double()
    assert ((fused.double() - behind).abs() <= UNIT[x.dtype] * behind.abs() + 2**-20 * (1 + actual.double().square())).all()
    exact = reference.linear(x.double(), pack_codes(codes, 4), *grid, bias, 16)
    weight = reference.dequantize(pack_codes(codes, 4), *grid, 32, 16).double()
    bound = linear_bound(x, grid, codes.double(), 4, 16, exact, bias.double())
    bound += 1.01 * UNIT[x.dtype] * (x.double().abs() @ weight.abs().t() + bias.double().abs())
    assert ((actual.double() - exact).abs() <= bound).all()


@settings(max_examples=5, deadline=None)
@given(outside=st.sampled_from([-1, -(2**31), 7, 2**31 - 1]))
def check_embedding_outside_the_table(outside):
    grid, codes, _ = packed_weight(7, 20, 3, 16, False, 0)
    words = as_words(grid, codes, 3, 16)
    actual = triton_embedding.embedding(torch.tensor([6, outside, 0]), *words, 20, 3, 16, torch.float32)
    assert actual[1].isnan().all() and not actual[[0, 2]].isnan().any()


def check_offsets_beyond_2_gib():
    """The last row of a table of over 4 GiB, so more than 2 ** 31 words; of its pages only that row's are ever touched."""
    rows, columns, bits = 2**19 + 8, 2**15, 2
    words = torch.empty(rows, columns * bits // 16, dtype=torch.int16)
    words[-1].random_()
    scale = torch.empty(1, rows, dtype=torch.float16)
    scale[:, -1] = 0.5
    table = (words, scale, None, torch.ones(1))
    actual = triton_embedding.embedding(torch.tensor([rows - 1]), *table, columns, bits, columns, torch.float32)
    last = dequantize_words(words[-1:], scale[:, -1:], None, torch.ones(1), bits, columns, columns)
    assert torch.equal(actual, last)


# ---- tests


@pytest.mark.parametrize("kernel", ["linear", "epilogue", "embedding"])
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


def test_other_dtypes_and_activations_are_refused():
    grid, codes, _ = packed_weight(2, 8, 4, 8, True, 0)
    words = as_words(grid, codes, 4, 8)
    with pytest.raises(TypeError, match="float64"):
        triton_linear.linear(torch.zeros(1, 8, dtype=torch.float64), *words, None, 4, 8)
    with pytest.raises(ValueError, match="softsign"):
        triton_linear.fused_linear(torch.zeros(1, 8), (Matrix(*words),), 4, 8, epilogue=Epilogue("softsign"))
    with pytest.raises(TypeError, match="float64"):
        triton_embedding.embedding(torch.zeros(1, dtype=torch.int64), *words, 8, 4, 8, torch.float64)


@pytest.mark.parametrize("bits", range(1, 9))
def test_shifts_at_compile_time_are_those_of_the_layout(bits):
    layout = WordLayout.of(bits, 4096, 64)
    assert unpack.widest_plane(bits) == layout.widest
    for plane in layout.planes:
        assert unpack.low_of(plane.width, bits) == plane.low
        assert unpack.first_tile(plane.width, bits, layout.block_pieces) == plane.first_tile
        pieces = 16 // plane.width
        assert all(unpack.shift_of(i, bits, plane.width) == plane.shifts[i % pieces] for i in range(layout.block_pieces))


@pytest.mark.parametrize("half", [tl.float16, tl.bfloat16])
@pytest.mark.parametrize("bits", range(1, 8))
def test_codes_whose_products_are_added_up_begin_at_the_same_bit(bits, half):
    """Two pieces of a group have one scale, and one term for what a float is more than its code."""
    first = [unpack.mantissa_bit(i, bits, half, True, True) for i in range(WordLayout.of(bits, 4096, 64).block_pieces)]
    assert first[::2] == first[1::2] and max(first) <= (10 if half == tl.float16 else 7) - bits


# Two words at a time are extracted by PTX, which the interpreter cannot run: the compiled instructions are run here instead.


def run_ptx(ptx: str, code: int, words: int) -> int:
    """What an inline block of shifts, ands and ``lop3`` computes on 32-bit registers."""
    registers = {"$1": code, "$2": words}
    value = lambda name: registers[name] if name in registers else int(name, 0)  # noqa: E731
    operations = {
        "shr.b32": lambda a, b: a >> b if b < 32 else 0,
        "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF if b < 32 else 0,
        "lop3.b32": lambda a, b, c, table: {0xEA: (a & b) | c}[table],
    }
    for operation, operands in re.findall(r"(\w+\.b32) ([^;]*);", ptx):
        if operation in operations:
            target, *sources = operands.split(", ")
            registers[target] = operations[operation](*map(value, sources))
    return registers["$0"]


@compiled
def test_the_ptx_extracts_the_codes():
    """Of a decoding kernel of 3 bits: two words at a time, left where they are in a subnormal if there is room."""
    bits = 3
    kernel, _ = compile_product("sm_80", bits, rows=1)
    blocks = {
        re.sub(r"%\w+(?=, t|, 0xEA)", "$1", re.sub(r"t, %\w+", "t, $2", b)) for b in re.findall(r"\{ \.reg.*?\}", kernel.assembly)
    }
    found = re.findall(r"\{ \.reg \.b32 t; (\w+\.b32) t, \S+ (\d+); lop3\.b32 \S+ t, (\d+), \S+ 0xEA; \}", kernel.assembly)
    blocks = {f"{move} t, $2, {shift}; lop3.b32 $0, t, {mask}, $1, 0xEA;" for move, shift, mask in found}
    assert len(found) == kernel.assembly.count("lop3.b32")
    layout = WordLayout.of(bits, 4096, 128)
    codes = torch.randint(0, 2**bits, (1, 4096), dtype=torch.uint8)
    words = pack_words(codes, bits, 128).view(-1, layout.block_tiles, layout.piece)[0].int() & 0xFFFF
    used = set()
    for piece in range(layout.block_pieces):
        low, code = unpack.mantissa_bit(piece, bits, tl.float16, direct=True, unrolled=True), 0
        for plane in layout.planes:
            tile, i = divmod(piece, 16 // plane.width)
            shift, mask = plane.shifts[i] - low - plane.low, 0x10001 * ((2**plane.width - 1) << (low + plane.low))
            move = f"shr.b32 t, $2, {shift}" if shift >= 0 else f"shl.b32 t, $2, {-shift}"
            block = f"{move}; lop3.b32 $0, t, {mask}, $1, 0xEA;"
            assert block in blocks
            used.add(block)
            pair = words[plane.first_tile + tile, :2].tolist()
            code = run_ptx(block, code, pair[0] | pair[1] << 16)
        expected = codes[0, piece * layout.piece :][:2].tolist()
        assert code == (expected[0] | expected[1] << 16) << low
    assert used == blocks


# Groups of 7 columns and odd sizes: nothing is aligned, every piece loads its own scale.
HARDEST = {"n": 4097, "k": 4095, "group_size": 7}


@compiled
@pytest.mark.parametrize(
    ("target", "dtype", "rows", "bits"),
    [
        ("sm_80", torch.bfloat16, 8, 7),
        ("sm_80", torch.float32, 16, 8),
        ("sm_86", torch.float16, 128, 3),
        ("sm_90", torch.bfloat16, 128, 8),
        ("sm_100", torch.float16, 64, 5),
        ("gfx942", torch.bfloat16, 128, 6),
        ("gfx942", torch.float32, 1, 1),
    ],
)
def test_the_hardest_shapes_compile_without_spills(target, dtype, rows, bits):
    kernel, _ = compile_product(target, bits, rows, dtype, **HARDEST)
    assert 0 < kernel.registers <= 256
    assert kernel.spill_bytes == 0, f"{kernel.spill_bytes} bytes spilled"


@compiled
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_codebooks_compile_without_spills(target):
    kernel, _ = compile_product(target, 4, 1, codebook=True)
    assert kernel.spill_bytes == 0
    assert ("v_mfma" in kernel.assembly) == (target == "gfx942")


@compiled
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_embedding_compiles_without_spills(target):
    with torch.device("meta"):
        words = torch.empty(32000, WordLayout.of(5, 4096, 64).row_words, dtype=torch.int16)
        scale = torch.empty(64, 32000, dtype=torch.float16)
        indices, out = torch.empty(20, dtype=torch.int64), torch.empty(20, 4096)
    arguments = triton_embedding.launch_arguments(indices, words, scale, scale, torch.empty(1), 5, 64, None, out)
    assert aot.compile_ahead(triton_embedding.embedding_kernel, arguments, target).spill_bytes == 0


@compiled
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_comes_before_a_product_compiles_without_spills(target):
    """Rounding activations, and unpacking a whole weight."""
    layout = WordLayout.of(3, 4096, 128)
    with torch.device("meta"):
        x, rounded = torch.empty(5, 4096), triton_quantize.empty_activations(5, layout, 2, torch.device("meta"))
        scale, words = torch.empty(32, 4096).half(), torch.empty(4096, layout.row_words, dtype=torch.int16)
        packed, out = (words, scale, scale, torch.empty(1), None), torch.empty(4096, 4096).half()
        unpacking = triton_dequantize.launch_arguments(layout, *packed, out, ptx=target.startswith("sm"))
    rounding = triton_quantize.launch_arguments(x, layout, 2, 8, rounded)
    kernels = {triton_quantize.quantize_kernel: rounding, triton_dequantize.dequantize_kernel: unpacking}
    for kernel, arguments in kernels.items():
        assert aot.compile_ahead(kernel, arguments, target).spill_bytes == 0


if __name__ == "__main__":
    dot_of_bfloat16()
    if sys.argv[1] == "linear":
        check_linear()
        check_split_sums_do_not_depend_on_the_order_of_programs()
    elif sys.argv[1] == "epilogue":
        check_epilogue()
        check_several_matrices()
        check_grouped()
        check_batched()
        check_a_graph_of_fused_products()
    else:
        check_embedding()
        check_dequantize()
        check_bits()
        check_many_rows_are_multiplied_by_a_float_weight()
        check_embedding_outside_the_table()
        check_offsets_beyond_2_gib()
