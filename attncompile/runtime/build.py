"""Builds the library of kernels for ONNX Runtime: one C++17 file after another, no CUDA toolkit, no headers of ONNX
Runtime. ``setup.py`` runs this file before the package is installed, so it imports the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAME = "libattncompile_ort.so"
STAMP = ".sources"
"""Suffix of the file beside the wheel's library that names the sources it was made from."""

SOURCES = Path(__file__).parent / "csrc"
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow")
_FLAGS = ("-std=c++17", "-O2", "-s")
_SHARED = ("-shared", "-fPIC", "-fvisibility=hidden")
# Nothing of the C++ library is asked of the machine that the result runs on, nor given to other libraries there.
_OWN = ("-static-libstdc++", "-static-libgcc")


class BuildError(Exception):
    """There is no compiler, or it failed; the message says what to do."""


def compiler() -> str | None:
    """``$CXX``, else g++, else clang++; None where none is there."""
    given = os.environ.get("CXX")
    return next((found for name in ((given,) if given else ("g++", "clang++")) if (found := shutil.which(name))), None)


def source_hash() -> str:
    """Names the sources and how they are compiled."""
    digest = hashlib.sha256(repr((_FLAGS, _SHARED, _OWN)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(out: Path) -> Path:
    """Compile to ``out``, which appears whole or not at all.

    Raises:
        BuildError: no compiler, or what it said.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("there is no C++ compiler: install g++ (or clang++), or name one in CXX")
    exports = f"-Wl,--version-script={SOURCES / 'exports.map'}"
    unit = "".join(f'#include "{path.name}"\n' for path in sorted(SOURCES.glob("*.cpp")))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made = Path(scratch) / NAME
        command = [cxx, *_FLAGS, *_SHARED, *_OWN, exports, f"-I{SOURCES}", "-x", "c++", "-", "-ldl", "-o", str(made)]
        done = subprocess.run(command, input=unit, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            said = (done.stderr.strip() or "it said nothing").splitlines()
            raise BuildError(f"{cxx} failed: {next((line for line in said if 'error' in line), said[-1])[:300]}")
        made.replace(out)
    return out
