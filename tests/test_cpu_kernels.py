"""The C++ kernels against the reference in float64, in both builds, and the build itself against what goes wrong."""

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

from kbit_inductor.kernels import layout, reference
from kbit_inductor.kernels.cpu import build
from kbit_inductor.lowering import registry
from kbit_inductor.lowering.quantize import pack_codes
from kbit_inductor.quantizers import QUANTIZERS, Quantized, clip, rtn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = int(os.environ.get("KBIT_TEST_EXAMPLES", "150"))
UNIT_ROUNDOFF = 2.0**-24  # of float32

relaxed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


def make_weight(rows: int, columns: int, bits: int, group_size: int, with_offset: bool, exponent: int = 0) -> tuple:
    """Random packed operands ``(planes, scale, offset, global_scale)``."""
    groups = layout.group_count(columns, group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, groups) + 0.1).half()
    offset = torch.randn(rows, groups).half() * 2**bits if with_offset else None
    return layout.pack_codes(codes, bits), scale, offset, torch.tensor([2.0**exponent])


def assert_linear_accurate(x: torch.Tensor, weight: tuple, bias: torch.Tensor | None, group_size: int) -> None:
    """``|y - y64|`` against the a-priori bound of a float32 dot product (Higham, 2002, section 3.1), then one rounding.

    A product passes K additions at most, and the weight, the global scale and the bias are rounded once each; factor 2
    covers second-order terms. float16 may also round into its subnormals.
    """
    y = torch.ops.kbit.linear_cpu(x, *weight, bias, group_size)
    exact = reference.linear(x.double(), *weight, bias, group_size)
    dense = reference.dequantize(*weight, x.size(-1), group_size, torch.float64)
    magnitude = x.double().abs() @ dense.abs().t() + (0 if bias is None else bias.double().abs())
    summed = 2 * (x.size(-1) + 2) * UNIT_ROUNDOFF * magnitude
    info = torch.finfo(y.dtype)
    rounded = info.eps / 2 * (exact.abs() + summed) + info.smallest_normal * info.eps
    assert y.dtype == x.dtype and y.shape == exact.shape and y.is_contiguous()
    assert ((y.double() - exact).abs() <= summed + rounded).all()


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same kind of activations with other strides; the last dimension stays K."""
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "sliced":
        return torch.randn(x.size(0), 2 * x.size(1) + 1).to(x.dtype)[:, 1::2]
    if how == "expanded":
        return x[:1].expand(3, 2, x.size(1))
    if how == "vector":
        return torch.randn(x.size(1)).to(x.dtype)
    return x


sizes = st.one_of(st.sampled_from([0, 1, 2, 7, 8, 9, 63, 64, 65, 127, 128]), st.integers(0, 200))
groups = st.one_of(st.sampled_from([16, 32, 64, 128, 1000]), st.integers(1, 80))
bit_widths = st.integers(1, 8)
dtypes = st.sampled_from(DTYPES)


@relaxed
@given(
    batch=st.one_of(st.integers(0, 12), st.sampled_from([127, 128, 131])),
    rows=st.one_of(st.integers(0, 20), st.sampled_from([63, 100])),
    columns=sizes,
    bits=bit_widths,
    group_size=groups,
    with_offset=st.booleans(),
    dtype=dtypes,
    bias_dtype=st.one_of(st.none(), dtypes),
    how=st.sampled_from(["plain", "transposed", "sliced", "expanded", "vector"]),
    exponent=st.integers(-6, 2),
    seed=st.integers(0, 2**31),
)
def test_linear_matches_float64(batch, rows, columns, bits, group_size, with_offset, dtype, bias_dtype, how, exponent, seed):
    torch.manual_seed(seed)
    weight = make_weight(rows, columns, bits, group_size, with_offset, exponent - bits)
    x = strided(torch.randn(max(batch, 1) if how == "expanded" else batch, columns).to(dtype), how)
    bias = None if bias_dtype is None else torch.randn(rows).to(bias_dtype)
    assert_linear_accurate(x, weight, bias, group_size)


@pytest.mark.parametrize("columns", [1024, 1025, 2100, 4096])
@pytest.mark.parametrize("batch", [1, 5, 300])
def test_linear_with_rows_longer_than_a_tile(batch, columns):
    torch.manual_seed(columns)
    assert_linear_accurate(torch.randn(batch, columns), make_weight(37, columns, 3, 64, True), torch.randn(37), 64)


@pytest.mark.parametrize("bits", range(1, 9))
def test_identity_reads_back_every_weight(bits):
    weight = make_weight(11, 77, bits, 20, True)
    out = torch.ops.kbit.linear_cpu(torch.eye(77), *weight, None, 20)
    assert torch.equal(out.t(), reference.dequantize(*weight, 77, 20))


def test_truncated_planes_and_row_slices_are_valid_operands():
    planes, scale, offset, global_scale = make_weight(12, 70, 8, 16, True)
    weight = planes[:3, 2:9], scale[2:9], offset[2:9], global_scale
    assert_linear_accurate(torch.randn(4, 70), weight, None, 16)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [2, 9])
def test_nan_stays_in_its_row(batch, poison):
    weight = make_weight(13, 70, 4, 32, True)
    x = torch.randn(batch, 70)
    clean = torch.ops.kbit.linear_cpu(x, *weight, None, 32)
    x[1, 69] = poison
    out = torch.ops.kbit.linear_cpu(x, *weight, None, 32)
    assert not out[1].isfinite().any()
    others = torch.arange(batch) != 1
    assert torch.equal(out[others], clean[others])


def test_poison_beside_x_is_not_read():
    """Padding is zeros, not whatever follows in memory."""
    weight = make_weight(13, 70, 4, 32, False)
    x = torch.full((3, 100), float("nan"))
    x[:, :70] = 1
    assert torch.ops.kbit.linear_cpu(x[:, :70], *weight, None, 32).isfinite().all()


def test_result_does_not_depend_on_the_number_of_threads():
    weight = make_weight(300, 300, 4, 64, True)
    x = torch.randn(3, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch.ops.kbit.linear_cpu(x, *weight, None, 64)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, torch.ops.kbit.linear_cpu(x, *weight, None, 64))


@relaxed
@given(
    rows=st.integers(1, 40),
    columns=st.one_of(sizes, st.just(1100)),
    bits=bit_widths,
    group_size=groups,
    with_offset=st.booleans(),
    dtype=dtypes,
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    shape=st.sampled_from([(), (0,), (1,), (5,), (2, 3)]),
    seed=st.integers(0, 2**31),
)
def test_embedding_equals_the_reference(rows, columns, bits, group_size, with_offset, dtype, index_dtype, shape, seed):
    torch.manual_seed(seed)
    operands = (*make_weight(rows, columns, bits, group_size, with_offset, -bits), columns, group_size, dtype)
    indices = torch.randint(0, rows, shape, dtype=index_dtype)
    out = torch.ops.kbit.embedding_cpu(indices, *operands)
    assert out.dtype == dtype and torch.equal(out, reference.embedding(indices, *operands))
    if indices.dim() == 2:
        assert torch.equal(torch.ops.kbit.embedding_cpu(indices.t(), *operands), out.transpose(0, 1))


@pytest.mark.parametrize("index", [-1, 5, 2**40, -(2**40)])
def test_embedding_index_out_of_range(index):
    weight = make_weight(5, 16, 4, 16, True)
    with pytest.raises(IndexError, match="out of range"):
        torch.ops.kbit.embedding_cpu(torch.tensor([0, index]), *weight, 16, 16, torch.float32)


def _operands(**changes) -> tuple:
    planes, scale, offset, global_scale = make_weight(6, 40, 4, 16, True)
    valid = dict(x=torch.randn(2, 40), planes=planes, scale=scale, offset=offset, global_scale=global_scale)
    return tuple((valid | dict(bias=torch.randn(6), group_size=16) | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.randn(2, 41)), "planes must have shape"),
        (dict(x=torch.randn(2, 32)), "planes must have shape"),
        (dict(x=torch.tensor(1.0)), "x must be"),
        (dict(x=torch.randn(2, 40, dtype=torch.float64)), "x must be float32"),
        (dict(planes=torch.zeros(4, 6, 5)), "planes must be"),
        (dict(planes=torch.zeros(9, 6, 5, dtype=torch.uint8)), "1 to 8 bits"),
        (dict(planes=torch.zeros(0, 6, 5, dtype=torch.uint8)), "1 to 8 bits"),
        (dict(planes=torch.zeros(6, 5, dtype=torch.uint8)), "planes must be"),
        (dict(scale=torch.zeros(6, 2).half()), "scale must have shape"),
        (dict(scale=torch.zeros(6, 3)), "scale must be"),
        (dict(offset=torch.zeros(5, 3).half()), "offset must have shape"),
        (dict(offset=torch.zeros(6, 3)), "offset must be"),
        (dict(global_scale=torch.ones(2)), "global_scale must have shape"),
        (dict(global_scale=torch.ones(1).double()), "global_scale must be"),
        (dict(bias=torch.randn(5)), "bias must have shape"),
        (dict(bias=torch.zeros(6, dtype=torch.int32)), "bias must be"),
        (dict(group_size=0), "group_size"),
        (dict(group_size=-1), "group_size"),
        (dict(group_size=8), "scale must have shape"),
    ],
)
def test_wrong_operands_of_linear_raise(changes, message):
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        torch.ops.kbit.linear_cpu(*_operands(**changes))


def test_wrong_operands_of_embedding_raise():
    weight = make_weight(5, 16, 4, 16, True)
    embedding, index = torch.ops.kbit.embedding_cpu, torch.tensor([0])
    with pytest.raises(RuntimeError, match="indices must be"):
        embedding(torch.tensor([0.0]), *weight, 16, 16, torch.float32)
    with pytest.raises(RuntimeError, match="planes must have shape"):
        embedding(index, *weight, 24, 16, torch.float32)
    with pytest.raises(RuntimeError, match="embedding_dim"):
        embedding(index, *weight, -1, 16, torch.float32)
    with pytest.raises(RuntimeError, match="dtype must be"):
        embedding(index, *weight, 16, 16, torch.float64)


# --- quantizing and packing ------------------------------------------------------------------------------------------


def in_pytorch(function, *arguments):
    """What ``function`` gives when there is no compiled library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_cpu_library_problem", lambda: "not in this test")
        return function(*arguments)


def group_errors(weight: torch.Tensor, quantized: Quantized, bits: int, group_size: int) -> torch.Tensor:
    """The squared error ``[N, G]`` of every group."""
    rows, columns = weight.shape
    grids = quantized.scale, quantized.offset, quantized.global_scale
    values = reference.dequantize(layout.pack_codes(quantized.codes, bits), *grids, columns, group_size)
    padding = quantized.scale.size(1) * group_size - columns
    error = torch.nn.functional.pad((values.double() - weight.double()).square(), (0, padding))
    return error.view(rows, -1, group_size).sum(-1) if error.numel() else error[:, :0]


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
    name=st.sampled_from(sorted(QUANTIZERS)),
    how=st.sampled_from(["plain", "transposed", "sliced"]),
    mean=st.sampled_from([0.0, 0.0, 3.0]),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 2**31),
)
def test_quantizing_gives_what_pytorch_gives(rows, columns, bits, group_size, symmetric, dtype, name, how, mean, exponent, seed):
    torch.manual_seed(seed)
    weight = strided_weight(((torch.randn(rows, columns) + mean) * 2.0**exponent).to(dtype), how)
    arguments = weight, bits, group_size, symmetric
    found, wanted = QUANTIZERS[name](*arguments), in_pytorch(QUANTIZERS[name], *arguments)
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
    if name == "rtn" or bool(same.all()):
        assert same.all()
        assert found.error == pytest.approx(wanted.error, rel=1e-5, abs=1e-12)
        return
    # Sums are taken in another order, so two candidates that tie may swap. And where the refit lies between two numbers of half
    # precision, another one of them may be taken, with a slightly other error: seen in 1 of 10000 groups.
    ours, theirs = (group_errors(weight, quantized, bits, group_size) for quantized in (found, wanted))
    slack = 1e-12 * (float(weight.double().square().sum()) + 1e-300)
    tied = (ours <= theirs * (1 + 1e-5) + slack) & (theirs <= ours * (1 + 1e-5) + slack)
    assert int((~tied).sum()) <= 2
    assert (ours <= group_errors(weight, rtn(*arguments), bits, group_size) * (1 + 1e-5) + slack).all()


def test_quantizing_long_groups_gives_what_pytorch_gives():
    weight = torch.randn(5, 20_000)
    found, wanted = clip(weight, 4, 20_000, False), in_pytorch(clip, weight, 4, 20_000, False)
    assert found.error == pytest.approx(wanted.error, rel=1e-3)


def test_quantizing_does_not_depend_on_the_number_of_threads():
    weight = torch.randn(301, 100)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = clip(weight, 4, 32, False)
    finally:
        torch.set_num_threads(threads)
    many = clip(weight, 4, 32, False)
    assert torch.equal(one.codes, many.codes) and torch.equal(one.scale, many.scale) and one.error == many.error


@relaxed
@given(rows=st.integers(0, 20), columns=sizes, bits=bit_widths, transposed=st.booleans(), seed=st.integers(0, 2**31))
def test_packing_gives_what_pytorch_gives(rows, columns, bits, transposed, seed):
    torch.manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    codes = codes.t() if transposed else codes
    assert torch.equal(torch.ops.kbit.pack_codes_cpu(codes, bits), layout.pack_codes(codes, bits))
    assert torch.equal(pack_codes(codes, bits), in_pytorch(pack_codes, codes, bits))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(weight=torch.zeros(4)), "weight must be a matrix"),
        (dict(weight=torch.zeros(4, 4, dtype=torch.float64)), "weight must be float32"),
        (dict(bits=0), "bits must be 1 to 8"),
        (dict(bits=9), "bits must be 1 to 8"),
        (dict(group_size=0), "group_size must be at least 1"),
        (dict(candidates=-1), "candidates must be"),
    ],
)
def test_wrong_operands_of_quantize_raise(changes, message):
    valid = dict(weight=torch.zeros(4, 4), global_scale=1.0, bits=4, group_size=4, symmetric=False, lowest_shrink=0.5, candidates=4)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kbit.quantize_cpu(*(valid | changes).values())


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(4, 4), 4, "codes must be"),
        (torch.zeros(4, dtype=torch.uint8), 4, "codes must be a matrix"),
        (torch.zeros(4, 4, dtype=torch.uint8), 9, "bits must be 1 to 8"),
    ],
)
def test_wrong_operands_of_pack_codes_raise(codes, bits, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kbit.pack_codes_cpu(codes, bits)


# --- the build -------------------------------------------------------------------------------------------------------


def test_portable_build_passes_the_same_tests():
    if os.environ.get("KBIT_PORTABLE") == "1":
        pytest.skip("this is that run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not build", __file__]
    environment = os.environ | {"KBIT_PORTABLE": "1", "KBIT_TEST_EXAMPLES": "60"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


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
