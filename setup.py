"""With ``KBIT_PREBUILD=1`` the wheel holds the compiled CPU library and is one for this platform; without, it is pure Python.

All else is in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PREBUILD = os.environ.get("KBIT_PREBUILD", "0") not in ("", "0")


def _compiler() -> ModuleType:
    """kernels/cpu/compiler.py by its path: the package that it belongs to is not there yet. It imports torch."""
    spec = importlib.util.spec_from_file_location("_kbit_compiler", Path(__file__).parent / "kernels/cpu/compiler.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Adds the library to what the wheel holds."""

    def run(self) -> None:  # noqa: D102 (of setuptools)
        super().run()
        if PREBUILD and not self.editable_mode:
            compiler = _compiler()
            sources = compiler.sources()
            with tempfile.TemporaryDirectory() as scratch:
                library = compiler.compile_library(sources, Path(scratch))
                name = compiler.library_name(compiler.stamp(sources), library)
                shutil.copy(library, Path(self.build_lib) / "kbit_inductor/kernels/cpu" / name)


class PlatformDistribution(Distribution):
    """Tells setuptools that the wheel is not the same everywhere."""

    def has_ext_modules(self) -> bool:  # noqa: D102 (of setuptools)
        return PREBUILD


class BdistWheel(bdist_wheel):
    """The library is of this platform, but of no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102 (of setuptools)
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel}, distclass=PlatformDistribution)
