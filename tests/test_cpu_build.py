"""The compiled CPU library: what it is made of, where it comes from, and what goes wrong on the way."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.kernels.cpu import build, compiler
from kbit_inductor.lowering import registry

SETS = compiler.instruction_sets()


# --- the table of flags ----------------------------------------------------------------------------------------------


def test_nothing_is_compiled_for_the_machine_that_compiles():
    flags = [flag for job in compiler.jobs(compiler.sources()) for flag in job.flags]
    assert flags and not any("native" in flag for flag in flags)


def test_objects_are_linked_from_the_least_instruction_set_to_the_greatest():
    levels = [job.level for job in compiler.jobs(compiler.sources())]
    ranks = {"any": -1} | {name: rank for rank, name in enumerate(SETS)}
    assert [ranks[level] for level in levels] == sorted(ranks[level] for level in levels)
    assert set(levels) == set(ranks)


def test_every_source_of_the_table_exists_and_every_source_is_compiled():
    units = [source.name for source in compiler.sources() if source.suffix == ".cpp"]
    assert compiler.UNITS.keys() <= set(units)
    foreign = {name for name, unit in compiler.UNITS.items() if not SETS.keys() & set(unit.sets)}
    assert {job.source.name for job in compiler.jobs(compiler.sources())} == set(units) - foreign


def test_the_cost_of_counting_bits_is_known_for_every_instruction_set():
    assert registry.BIT_PAIRS.keys() == {name for sets in compiler.INSTRUCTION_SETS.values() for name in sets}


def test_a_source_that_the_table_does_not_name_is_compiled_once_for_any_machine(tmp_path):
    (job,) = compiler.jobs([tmp_path / "new.cpp", tmp_path / "new.h"])
    assert (job.level, job.flags) == ("any", SETS["portable"])


@pytest.mark.skipif("avxvnni" not in SETS, reason="AVX-VNNI is of x86-64")
def test_avxvnni_has_no_function_that_the_linker_may_give_to_others(tmp_path):
    # It stands before avx512 in the order of linking, which does not hold it.
    source = Path(compiler.__file__).parent / "dot_avxvnni.cpp"
    target = tmp_path / "object.o"
    flags = [*compiler._common_flags(), *SETS["avxvnni"], "-DKBIT_LEVEL=avxvnni"]
    subprocess.run([*compiler._command(), *flags, "-c", str(source), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "--defined-only", str(target)], capture_output=True, text=True, check=True).stdout
    kinds = {line.split()[-2] for line in symbols.splitlines()}
    assert kinds and not kinds & set("WVu"), symbols


def test_the_stamp_follows_sources_flags_and_torch_but_not_the_name_of_the_compiler(monkeypatch, tmp_path):
    source = tmp_path / "tiny.cpp"
    source.write_text("int answer() { return 42; }")
    monkeypatch.setenv("CXX", "g++")
    stamp = compiler.stamp([source])
    monkeypatch.setenv("CXX", "/usr/local/bin/clang++")
    assert compiler.stamp([source]) == stamp
    monkeypatch.setenv("CXX", "g++ -fsanitize=address")
    others = [compiler.stamp([source])]
    monkeypatch.setenv("CXX", "g++")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "2.11.7")
        others.append(compiler.stamp([source]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compiler.UNITS, "tiny.cpp", compiler.Unit(("portable",), ("-g",)))
        others.append(compiler.stamp([source]))
    source.write_text("int answer() { return 43; }")
    others.append(compiler.stamp([source]))
    assert len({stamp, *others}) == 5


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache, and one source that compiles in no time in place of ours."""
    source = tmp_path / "tiny.cpp"
    source.write_text(f"int answer() {{ return 42; }}  // {tmp_path.name}: once loaded, a library stays")
    monkeypatch.setattr(compiler, "sources", lambda: [source])
    monkeypatch.setattr(build, "wheel_dir", lambda: tmp_path / "wheel")
    monkeypatch.setenv("KBIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "g++")
    return tmp_path / "cache"


def script(path: Path, text: str) -> str:
    """A compiler that does what ``text`` says."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def libraries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.name != "lock"]


def test_two_processes_at_once_compile_once(cache, tmp_path):
    counting = script(tmp_path / "counting", f'echo call >> {tmp_path}/calls; sleep 0.3; exec g++ "$@"')
    code = f"""
from pathlib import Path
from kbit_inductor.kernels.cpu import build, compiler
from kbit_inductor.lowering import registry
compiler.sources = lambda: [Path({str(tmp_path / "tiny.cpp")!r})]
build.wheel_dir = lambda: Path({str(tmp_path / "wheel")!r})
print(build.build())
"""
    command, environment = [sys.executable, "-c", code], os.environ | {"CXX": counting}
    with ThreadPoolExecutor(2) as pool:
        race = [
            pool.submit(subprocess.run, command, env=environment, capture_output=True, text=True, timeout=300) for _ in range(2)
        ]
    assert [run.result().returncode for run in race] == [0, 0], [run.result().stderr for run in race]
    (library,) = libraries(cache)
    assert {run.result().stdout.strip() for run in race} == {str(library)}
    assert (tmp_path / "calls").read_text().split() == ["call", "call"]  # one source and the linking


def test_a_truncated_library_is_replaced(cache):
    library = build.build()
    whole = library.read_bytes()
    modified = library.stat().st_mtime_ns
    assert build.build() == library and library.stat().st_mtime_ns == modified
    library.write_bytes(whole[: len(whole) // 2])
    assert build.build().read_bytes() == whole
    assert libraries(cache) == [library]


def test_a_library_that_does_not_load_is_built_again(cache):
    cache.mkdir()
    junk = cache / "junk"
    junk.write_bytes(b"whole, but no library")
    junk = junk.rename(cache / compiler.library_name(compiler.stamp(compiler.sources()), junk))
    build._load_once.__wrapped__()
    (library,) = libraries(cache)
    assert library != junk


def test_a_library_that_does_not_load_when_new_is_an_error(cache, monkeypatch):
    def refuse(path):
        raise OSError("wrong ELF class")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    with pytest.raises(compiler.CpuBuildError, match="wrong ELF class"):
        build._load_once.__wrapped__()


def test_a_library_that_a_package_has_brought_is_not_loaded_again(cache, monkeypatch, tmp_path):
    brought = build.build().rename(tmp_path / "any name")
    ctypes.CDLL(str(brought))
    brought.unlink()
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    build._load_once.__wrapped__()


def test_a_cached_library_needs_no_compiler_and_writes_nothing(cache, monkeypatch):
    library = build.build()
    (cache / "lock").unlink()
    cache.chmod(0o555)
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert build.build() == library
    assert list(cache.iterdir()) == [library]


def test_the_default_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("KBIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / "kbit_inductor"


def test_a_cache_that_cannot_be_written(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KBIT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(compiler.CpuBuildError, match=r"cannot write.*file/cache(?s:.*)KBIT_CACHE_DIR"):
        build.build()


def test_a_full_disk(cache, monkeypatch, tmp_path):
    full = script(tmp_path / "full", f'echo "{os.strerror(28)}" >&2; exit 1')
    monkeypatch.setenv("CXX", full)
    with pytest.raises(compiler.CpuBuildError, match=r"No space left(?s:.*)KBIT_CACHE_DIR"):
        build.build()
    assert not libraries(cache)


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    with pytest.raises(compiler.CpuBuildError, match=r"apt install g\+\+.*CXX"):
        build.build()
    assert not libraries(cache)


def test_what_the_compiler_said_is_shown(cache, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -fno-such-option")
    with pytest.raises(compiler.CpuBuildError, match=r"(?s)no-such-option.*C\+\+20"):
        build.build()
    assert not libraries(cache)


# --- a library in the wheel ------------------------------------------------------------------------------------------


def test_the_wheels_library_is_taken_where_its_stamp_fits(cache, monkeypatch, tmp_path):
    built = build.build()
    (tmp_path / "wheel").mkdir()
    library = built.rename(tmp_path / "wheel" / built.name)
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert build.build() == library
    monkeypatch.setattr(torch, "__version__", "2.11.7")
    with pytest.raises(compiler.CpuBuildError, match="no C"):
        build.build()


def test_the_wheels_library_that_does_not_load_is_passed_over(cache, tmp_path):
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    junk = wheel / "junk"
    junk.write_bytes(b"whole, but no library")
    junk.rename(wheel / compiler.library_name(compiler.stamp(compiler.sources()), junk))
    build._load_once.__wrapped__()
    assert len(libraries(cache)) == 1


# --- KBIT_ISA --------------------------------------------------------------------------------------------------------


def test_an_instruction_set_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("KBIT_ISA", "z80")
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(2, 64)
    with pytest.raises(kbit.InvalidOptionError, match=f"'z80'.*it can be {', '.join(SETS)}"):
        torch.compile(model, backend="kbit")(x)
    with pytest.raises(kbit.InvalidOptionError, match="'z80'"):
        kbit.explain(model, x)


def test_an_instruction_set_that_the_machine_lacks(monkeypatch):
    build.load()
    usable = torch.ops.kbit.isas_cpu()
    lacking = [name for name in SETS if name not in usable]
    if not lacking:
        pytest.skip("this machine has them all")
    monkeypatch.setenv("KBIT_ISA", lacking[-1])
    with pytest.raises(kbit.InvalidOptionError, match=f"'{lacking[-1]}', which this machine does not have.*portable"):
        torch.compile(nn.Sequential(nn.Linear(64, 32)), backend="kbit")(torch.randn(2, 64))


# --- instruction sets against each other -----------------------------------------------------------------------------

SOURCES = Path(compiler.__file__).parent
DIGEST = Path(__file__).parent / "cpp" / "dot_digest.cpp"
CONSTANTS = {"avxvnni": "kAvxVnni", "avx512vnni": "kAvx512Vnni"}  # others are their names with a capital


def digest(folder: Path, compilers: list[str], name: str, flags: tuple[str, ...], emulator: tuple[str, ...] = ()) -> str:
    """What tests/cpp/dot_digest.cpp prints of the instruction set ``name``."""
    program = folder / f"digest-{name}"
    constant = CONSTANTS.get(name, f"k{name.capitalize()}")
    common = ["-std=c++20", "-O2", "-static", f"-DKBIT_ISA_UNDER_TEST={constant}", *flags]
    # Those for more than the flags allow are empty.
    sources = [str(DIGEST), str(SOURCES / f"dot_{name}.cpp"), *map(str, SOURCES.glob("bit_*.cpp"))]
    subprocess.run([*compilers, *common, *sources, "-o", str(program)], check=True)
    return subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def portable_digest(tmp_path_factory) -> str:
    return digest(tmp_path_factory.mktemp("digest"), ["g++"], "portable", SETS["portable"])


@pytest.mark.parametrize("name", [name for name in SETS if name != "portable"])
def test_an_instruction_set_computes_what_portable_computes(name, portable_digest, tmp_path):
    build.load()
    flags = SETS[name]
    if name not in torch.ops.kbit.isas_cpu():
        if name != "avxvnni" or "avx2" not in torch.ops.kbit.isas_cpu():
            pytest.skip(f"this machine does not have {name}")
        flags = (*SETS["avx2"], "-include", str(DIGEST.parent / "dpbusd.h"))  # all but the one instruction
    assert digest(tmp_path, ["g++"], name, flags) == portable_digest


@pytest.mark.parametrize("name", compiler.INSTRUCTION_SETS["aarch64"])
def test_arm_computes_what_portable_computes(name, portable_digest, tmp_path):
    tools = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
    missing = [package for tool, package in tools.items() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs apt install {' '.join(missing)}")
    flags = compiler.INSTRUCTION_SETS["aarch64"][name]
    assert digest(tmp_path, ["aarch64-linux-gnu-g++"], name, flags, ("qemu-aarch64",)) == portable_digest
