"""What a user gets: sdist and wheel are built, installed apart from the repository, and used from outside it."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from sysconfig import get_platform

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Folder in the repository → its place in the wheel.
FOLDERS = {
    "kbit_inductor": "kbit_inductor",
    "lowering": "kbit_inductor/lowering",
    "kernels": "kbit_inductor/kernels",
}
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "demo-output", "*.egg-info", "__pycache__", "*.py[cod]", "*.so", ".*_cache"
)


def run(command: list[str], **options: object) -> str:
    """The standard output of ``command``; a failure shows both of its streams."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command} failed\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@dataclass(frozen=True)
class Installed:
    """The two distributions and a folder that the wheel is installed into."""

    sdist: Path
    wheel: Path
    target: Path

    def python(self, code: str, **environment: str) -> str:
        """Run ``code`` where the wheel is installed and the repository is not; returns what it prints.

        ``-S`` leaves out ``.pth`` files and with them an editable install. torch and the like come from the folders
        that the running interpreter installs into, after the wheel.
        """
        path = os.pathsep.join([str(self.target), *site.getsitepackages()])
        repository = f"pathlib.Path({str(REPOSITORY)!r})"
        check = f"import sys, pathlib\nassert {repository} not in map(pathlib.Path, sys.path), sys.path\n"
        return run(
            [sys.executable, "-S", "-c", check + code],
            cwd=self.target.parent,
            env={**os.environ, "PYTHONPATH": path, "PYTHONNOUSERSITE": "1", **environment},
        )


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    # A copy, since setuptools builds in place and takes up what an earlier build left in build/.
    root = tmp_path_factory.mktemp("packaging")
    copy, out, target = root / "copy", root / "out", root / "target"
    shutil.copytree(REPOSITORY, copy, ignore=NOT_SOURCES)
    out.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run([sys.executable, "-c", build], cwd=copy)
    (sdist,) = out.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # From the sdist, so a file that is missing there is missing in the wheel too.
    offline = ["--no-deps", "--no-index"]
    run([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(out), str(sdist)], cwd=root)
    (wheel,) = out.glob("*.whl")
    run([*pip, "install", *offline, "--target", str(target), str(wheel)], cwd=root)
    return Installed(sdist, wheel, target)


def sources(folder: str) -> list[PurePosixPath]:
    """Code and data under a folder of the repository, as paths from the repository."""
    paths = (REPOSITORY / folder).rglob("*")
    kept = [p for p in paths if p.is_file() and p.suffix not in {".pyc", ".pyo", ".so"} and "__pycache__" not in p.parts]
    return [PurePosixPath(p.relative_to(REPOSITORY).as_posix()) for p in kept]


def test_wheel_holds_every_file_of_the_three_folders(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as wheel:
        held = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    wanted = {str(PurePosixPath(place) / path.relative_to(folder)) for folder, place in FOLDERS.items() for path in sources(folder)}
    wanted.add("kbit_command.py")
    # A folder of Python files that is missing here is to be added to [tool.setuptools] packages in pyproject.toml, data
    # to [tool.setuptools.package-data].
    assert held == wanted
    assert "kbit_inductor/py.typed" in held
    assert any(name.startswith("kbit_inductor/kernels/cpu/") and name.endswith(".cpp") for name in held)


def test_sdist_holds_the_repository(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {str(path) for folder in (*FOLDERS, "tests", "benchmarks", "docs") for path in sources(folder)}
    wanted |= {"pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile", "constraints.txt", ".ci/run"}
    assert wanted <= held, sorted(wanted - held)


def test_imports_from_outside_the_repository(installed: Installed) -> None:
    printed = installed.python(
        "import kbit_inductor, kbit_inductor.lowering, kbit_inductor.kernels.layout\n"
        "for name in ('kbit_inductor', 'kbit_inductor.lowering', 'kbit_inductor.kernels.layout'):\n"
        "    print(sys.modules[name].__file__)"
    )
    package = installed.target / "kbit_inductor"
    assert [Path(line) for line in printed.split()] == [
        package / "__init__.py",
        package / "lowering" / "__init__.py",
        package / "kernels" / "layout.py",
    ]


def test_backend_is_found_without_an_import(installed: Installed) -> None:
    installed.python(
        "import torch\n"
        "assert 'kbit' in torch._dynamo.list_backends()\n"
        "assert 'kbit_inductor' not in sys.modules, 'listing the backends should not load them'"
    )


def test_compiles_from_outside_the_repository(installed: Installed) -> None:
    printed = installed.python(
        "import torch\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).eval()\n"
        "x = torch.randn(3, 96)\n"
        "with torch.no_grad():\n"
        "    wanted = model(x)\n"
        "    got = torch.compile(model, backend='kbit', options={'bits': 8})(x)\n"
        "print(float((got - wanted).norm() / wanted.norm()))\n"
        "print(sys.modules['kbit_inductor'].__file__)"
    )
    error, file = printed.split()[-2:]
    # Not 0: the weights were quantized. Eight bits leave well under a percent; activations may have eight bits as well.
    assert 0 < float(error) < 0.03
    assert Path(file).is_relative_to(installed.target)


def test_imports_without_triton(installed: Installed) -> None:
    installed.python(
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'triton':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import torch, kbit_inductor, kbit_inductor.backend, kbit_inductor.lowering, kbit_inductor.kernels.cpu\n"
        "assert 'kbit' in torch._dynamo.list_backends()\n"
        "assert 'triton' not in sys.modules"
    )


def test_imports_without_a_compiler(installed: Installed, tmp_path: Path) -> None:
    installed.python(
        "import shutil\n"
        "assert shutil.which('g++') is None\n"
        "import kbit_inductor, kbit_inductor.backend, kbit_inductor.lowering, kbit_inductor.kernels.cpu",
        PATH=str(tmp_path),
        CXX="",
    )


def test_a_product_runs_on_the_reference_without_a_compiler(installed: Installed, tmp_path: Path) -> None:
    # A product alone: what surrounds products is compiled by Inductor, which needs a compiler of its own.
    printed = installed.python(
        "import logging, torch\n"
        "logging.basicConfig(stream=sys.stdout)\n"
        "linear, x = torch.nn.Sequential(torch.nn.Linear(96, 64)), torch.randn(3, 96)\n"
        "import kbit_inductor\n"
        "with torch.no_grad():\n"
        "    for bits in (8, 7):\n"
        "        torch.compile(linear, backend='kbit', options={'bits': bits})(x)\n"
        "    layer, = kbit_inductor.explain(linear, x).layers\n"
        "assert layer.kernels == ('reference',) and 'no C++ compiler' in layer.rejected['cpu'], layer\n",
        PATH=str(tmp_path),
        CXX="",
        KBIT_CACHE_DIR=str(tmp_path / "cache"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    assert printed.count("slow reference kernel") == 1


def test_a_wheel_with_the_library_needs_no_compiler(tmp_path: Path) -> None:
    copy, out, target = tmp_path / "copy", tmp_path / "out", tmp_path / "target"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns("tests", "benchmarks", "docs", ".*", "build"))
    cpu = copy / "kernels" / "cpu"
    for path in [*cpu.glob("*.cpp"), *cpu.glob("*.h"), *cpu.glob("*.so")]:  # compiling what is here would take a minute
        path.unlink()
    (cpu / "tiny.cpp").write_text("int answer() { return 42; }")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel_command = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    run(wheel_command, env={**os.environ, "KBIT_PREBUILD": "1"}, cwd=tmp_path)
    (wheel,) = out.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{get_platform().replace('-', '_')}.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], cwd=tmp_path)
    code = "from kbit_inductor.kernels.cpu import build; build.load(); print(build.build())"
    cache = tmp_path / "cache"
    cache.mkdir()
    environment = {"PATH": str(cache), "CXX": "", "KBIT_CACHE_DIR": str(cache)}
    printed = Installed(wheel, wheel, target).python(code, **environment)
    assert Path(printed.strip()).parent == target / "kbit_inductor" / "kernels" / "cpu"
    assert not list(cache.iterdir())
