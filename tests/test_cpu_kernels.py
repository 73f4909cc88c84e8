"""Quantizing in C++ against PyTorch."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from threads import with_threads

from kbit_inductor.kernels import layout, reference
from kbit_inductor.kernels.cpu import build
from kbit_inductor.lowering import registry
from kbit_inductor.quantizers import CODEBOOK_NAMES, Format, Quantized, Statistics, clip, codebook, rtn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = int(os.environ.get("KBIT_TEST_EXAMPLES", "150"))

relaxed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


sizes = st.one_of(st.sampled_from([0, 1, 2, 7, 8, 9, 63, 64, 65, 127, 128]), st.integers(0, 200))
groups = st.one_of(st.sampled_from([16, 32, 64, 128, 1000]), st.integers(1, 80))
bit_widths = st.integers(1, 8)
dtypes = st.sampled_from(DTYPES)


def in_pytorch(function, *arguments):
    """What ``function`` gives when there is no compiled library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "cpu_library_problem", lambda: "not in this test")
        return function(*arguments)


def group_errors(weight: torch.Tensor, quantized: Quantized, form: Format, importance: torch.Tensor) -> torch.Tensor:
    """The squared error ``[N, G]`` of every group."""
    rows, columns = weight.shape
    grids = quantized.scale, quantized.offset, quantized.global_scale
    planes, table = layout.pack_codes(quantized.codes, form.bits), form.levels.table(weight.device)
    values = reference.dequantize(planes, *grids, columns, form.group_size, codebook=table)
    padding = quantized.scale.size(1) * form.group_size - columns
    error = torch.nn.functional.pad((values.double() - weight.double()).square() * importance, (0, padding))
    return error.view(rows, -1, form.group_size).sum(-1) if error.numel() else error[:, :0]


def strided_weight(weight: torch.Tensor, how: str) -> torch.Tensor:
    """The same values, or the transpose's, with other strides."""
    return {"plain": weight, "transposed": weight.t(), "sliced": torch.stack([weight, weight], -1)[..., 0]}[how]


@relaxed
@given(
    rows=st.one_of(st.integers(0, 40), st.just(300)),
    columns=sizes,
    bits=bit_widths,
    group_size=groups,
    symmetric=st.booleans(),
    dtype=dtypes,
    quantize=st.sampled_from([clip, rtn]),
    weighted=st.booleans(),
    book=st.sampled_from(CODEBOOK_NAMES),
    how=st.sampled_from(["plain", "transposed", "sliced"]),
    mean=st.sampled_from([0.0, 0.0, 3.0]),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 2**31),
)
def test_quantizing_gives_what_pytorch_gives(
    rows, columns, bits, group_size, symmetric, dtype, quantize, weighted, book, how, mean, exponent, seed
):
    torch.manual_seed(seed)
    weight = strided_weight(((torch.randn(rows, columns) + mean) * 2.0**exponent).to(dtype), how)
    form = Format(bits, group_size, symmetric, codebook(book, bits))
    statistics = Statistics(torch.rand(weight.size(1)) ** 4) if weighted and weight.size(1) else None
    arguments = weight, form, statistics
    found, wanted = quantize(*arguments), in_pytorch(quantize, *arguments)
    for ours, theirs in zip(
        (found.codes, found.scale, found.offset, found.global_scale),
        (wanted.codes, wanted.scale, wanted.offset, wanted.global_scale),
        strict=True,
    ):
        assert (ours is None and theirs is None) or (ours.shape == theirs.shape and ours.dtype == theirs.dtype)
    assert torch.equal(found.global_scale, wanted.global_scale)

    same = found.scale == wanted.scale
    if not symmetric:
        same &= found.offset == wanted.offset
    differs = ~same[:, torch.arange(weight.size(1)) // group_size]
    assert ((found.codes == wanted.codes) | differs).all()
    if quantize is rtn or bool(same.all()):
        assert same.all()
        assert found.error == pytest.approx(wanted.error, rel=1e-5, abs=1e-12)
        return
    # Sums are taken in another order, so two candidates that tie may swap. And where the refit lies between two numbers of half
    # precision, another one of them may be taken, with a slightly other error: seen in 1 of 10000 groups.
    importance = statistics.importance() if statistics and quantize is clip else torch.ones(weight.size(1))
    ours, theirs = (group_errors(weight, quantized, form, importance) for quantized in (found, wanted))
    slack = 1e-12 * (float(weight.double().square().sum()) + 1e-300)
    tied = (ours <= theirs * (1 + 1e-5) + slack) & (theirs <= ours * (1 + 1e-5) + slack)
    assert int((~tied).sum()) <= 2
    assert (ours <= group_errors(weight, rtn(*arguments), form, importance) * (1 + 1e-5) + slack).all()


def test_quantizing_long_groups_gives_what_pytorch_gives():
    weight = torch.randn(5, 20_000)
    found, wanted = clip(weight, Format(4, 20_000)), in_pytorch(clip, weight, Format(4, 20_000))
    assert found.error == pytest.approx(wanted.error, rel=1e-3)


def test_quantizing_does_not_depend_on_the_number_of_threads():
    weight = torch.randn(301, 100)
    one, many = with_threads(1, clip, weight, Format(4, 32)), with_threads(2, clip, weight, Format(4, 32))
    assert torch.equal(one.codes, many.codes) and torch.equal(one.scale, many.scale) and one.error == many.error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(weight=torch.zeros(4)), "weight must be a matrix"),
        (dict(weight=torch.zeros(4, 4, dtype=torch.float64)), "weight must be float32"),
        (dict(bits=0), "bits must be 1 to 8"),
        (dict(bits=9), "bits must be 1 to 8"),
        (dict(group_size=0), "group_size must be at least 1"),
        (dict(candidates=-1), "candidates must be"),
        (dict(refits=-1), "refits must be"),
        (dict(importance=torch.ones(5)), "importance must be"),
        (dict(importance=torch.ones(4).double()), "importance must be"),
        (dict(codebook=torch.arange(15).byte()), "codebook must have shape"),
        (dict(codebook=torch.arange(16).byte().flip(0)), "codebook must ascend"),
        (dict(bits=8, codebook=torch.arange(256).byte()), "codebooks are of 2 to 7 bits"),
    ],
)
def test_wrong_operands_of_quantize_raise(changes, message):
    valid = dict(
        weight=torch.zeros(4, 4), global_scale=1.0, bits=4, group_size=4, symmetric=False, lowest_shrink=0.5, highest_shrink=1.0,
        candidates=4, codebook=None, importance=None, refits=1,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kbit.quantize_cpu(*(valid | changes).values())
