"""Quantizing in C++ against PyTorch, and the build of the kernels against what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


# --- quantizing ------------------------------------------------------------------------------------------------------


def in_pytorch(function, *arguments):
    """What ``function`` gives when there is no compiled library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_cpu_library_problem", lambda: "not in this test")
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


# --- the build -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_source(monkeypatch, tmp_path) -> Path:
    """A source that compiles in no time, and an empty cache, which is returned."""
    source = tmp_path / "tiny.cpp"
    source.write_text("int answer() { return 42; }")
    cache = tmp_path / "cache"
    monkeypatch.setattr(build, "sources", lambda: [source])
    monkeypatch.setenv("KBIT_CACHE_DIR", str(cache))
    return cache


def test_build_survives_a_race(tiny_source):
    code = f"""
from pathlib import Path
from kbit_inductor.kernels.cpu import build
build.sources = lambda: [Path({str(tiny_source.parent / "tiny.cpp")!r})]
print(build.build())
"""
    with ThreadPoolExecutor(2) as pool:
        command = [sys.executable, "-c", code]
        race = [pool.submit(subprocess.run, command, capture_output=True, text=True, timeout=300) for _ in range(2)]
    assert [run.result().returncode for run in race] == [0, 0], [run.result().stderr for run in race]
    (library,) = tiny_source.iterdir()  # one library, and no scratch directory left behind
    assert {run.result().stdout.strip() for run in race} == {str(library)}


def test_build_replaces_a_truncated_library(tiny_source):
    library = build.build()
    whole = library.read_bytes()
    modified = library.stat().st_mtime_ns
    assert build.build() == library and library.stat().st_mtime_ns == modified
    library.write_bytes(whole[: len(whole) // 2])
    assert build.build().read_bytes() == whole
    assert list(tiny_source.iterdir()) == [library]


def test_build_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setenv("KBIT_CACHE_DIR", str(tmp_path))
    with pytest.raises(build.CpuBuildError, match=r"apt install g\+\+.*CXX"):
        build.build()


def test_build_shows_what_the_compiler_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "g++ -fno-such-option")
    monkeypatch.setenv("KBIT_CACHE_DIR", str(tmp_path))
    with pytest.raises(build.CpuBuildError, match=r"(?s)no-such-option.*C\+\+20"):
        build.build()
    assert not list(tmp_path.iterdir())


def test_build_into_a_directory_that_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("KBIT_CACHE_DIR", str(file / "cache"))
    with pytest.raises(build.CpuBuildError, match="KBIT_CACHE_DIR"):
        build.build()


def test_build_key_follows_flags():
    assert build._cache_key(["g++"], ["-O2"]) == build._cache_key(["g++"], ["-O2"])
    assert build._cache_key(["g++"], ["-O2"]) != build._cache_key(["g++"], ["-O3"])


def test_build_default_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("KBIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "kbit_inductor"
