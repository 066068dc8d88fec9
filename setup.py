"""What pyproject.toml cannot say: the wheel carries the library of kernels for ONNX Runtime, where a compiler is there.

Without one the wheel is pure Python, and the library is compiled when it is first needed. Editable installs always do
that. ATTNCOMPILE_NO_LIBRARY=1 leaves it out.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
RUNTIME = Path("attncompile") / "runtime"


def _build() -> ModuleType:
    """``attncompile/runtime/build.py`` as a module of its own: the package's requirements are not there yet."""
    spec = importlib.util.spec_from_file_location("attncompile_runtime_build", HERE / RUNTIME / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = _build()
WANTED = sys.platform.startswith("linux") and os.environ.get("ATTNCOMPILE_NO_LIBRARY", "") in ("", "0")
COMPILES = WANTED and BUILD.compiler() is not None


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        if not COMPILES:
            sys.stderr.write(
                "warning: there is no C++ compiler: the wheel is without the library for ONNX Runtime, which is "
                "compiled when it is first needed\n"
            )
            return
        out = Path(self.build_lib) / RUNTIME / BUILD.NAME
        BUILD.compile_library(out)
        out.with_name(out.name + BUILD.STAMP).write_text(BUILD.source_hash() + "\n", encoding="ascii")


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform  # the library knows nothing of Python


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return COMPILES


setup(distclass=BinaryDistribution, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
